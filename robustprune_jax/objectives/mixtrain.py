"""MixTrain (Wang et al. 2018): symbolic bounds on a few images of each batch."""

import jax
import jax.numpy as jnp

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.bounds import margins, verified
from robustprune_jax.objectives.objective import Objective, accuracy, eval_logits, label_loss
from robustprune_jax.objectives.ramps import fraction


def mixtrain(config) -> Objective:
    """Returns the objective CE(f(x), y) + weight * CE(worst case of f, y), the second part for
    some batches and images only.

    With `probability`, `images` examples drawn with replacement from the batch are bounded by
    bounds.margins(method='symbolic') in eval mode. The weight is config.mixtrain.weight while eps
    rises, then grows 2.5 times every 5 epochs, up to 50 (the original's schedule).

    Reads config.certified (eps, ramp) and config.mixtrain.
    """
    eps, ramp, settings = config.certified.eps, config.certified.ramp, dict(config.mixtrain)
    label_cost = label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        take_key, images_key = jax.random.split(key)
        risen = fraction(ramp, progress)
        clean, batch_stats = logits_of(images, train=True)
        chosen = jax.random.randint(images_key, (settings['images'],), 0, len(images))

        def bounded():
            lower = margins(
                eval_logits(logits_of),
                images[chosen],
                labels[chosen],
                eps=risen * eps,
                method='symbolic',
                memory_gb=settings['memory_gb'],
            )
            robust = jnp.mean(cross_entropy(-lower, labels[chosen]))
            return weight(settings['weight'], progress) * robust, jnp.mean(verified(lower))

        takes = jax.random.bernoulli(take_key, settings['probability'])
        robust, verified_accuracy = jax.lax.cond(takes, bounded, lambda: (0.0, 0.0))
        metrics = {
            'accuracy': accuracy(clean, labels),
            'verified_accuracy': verified_accuracy / settings['probability'],
            'eps': risen * eps,
        }
        return jnp.mean(label_cost(clean, labels)) + robust, (carry, batch_stats, metrics)

    return Objective(loss, certificate={'method': 'crown_ibp', 'eps': eps})


def weight(start: float, progress) -> jax.Array:
    """Returns the weight of the bounded loss."""
    after_ramp = jnp.maximum(jnp.floor(progress.epoch) - progress.ramp_epochs, 0)
    return jnp.minimum(50, start * 2.5 ** (after_ramp // 5))
