"""Training on interval bounds (Gowal et al. 2018)."""

import jax.numpy as jnp

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.bounds import margins, verified
from robustprune_jax.objectives.objective import Objective, accuracy, eval_logits, label_loss
from robustprune_jax.objectives.ramps import between, fraction


def ibp(config) -> Objective:
    """Returns the objective kappa * CE(f(x), y) + (1 - kappa) * CE(worst case of f, y).

    The worst case is by interval bounds in eval mode, clipped to [0, 1]. Reads config.certified
    (eps, ramp) and config.ibp: kappa goes from kappa_start to kappa_end as eps rises.
    """
    eps, ramp, settings = config.certified.eps, config.certified.ramp, dict(config.ibp)
    label_cost = label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        risen = fraction(ramp, progress)
        kappa = between(settings['kappa_start'], settings['kappa_end'], risen)
        clean, batch_stats = logits_of(images, train=True)
        lower = margins(eval_logits(logits_of), images, labels, eps=risen * eps, method='ibp')
        natural = jnp.mean(label_cost(clean, labels))
        robust = jnp.mean(cross_entropy(-lower, labels))
        metrics = {
            'accuracy': accuracy(clean, labels),
            'verified_accuracy': jnp.mean(verified(lower)),
            'eps': risen * eps,
        }
        return kappa * natural + (1 - kappa) * robust, (carry, batch_stats, metrics)

    return Objective(loss, certificate={'method': 'ibp', 'eps': eps})
