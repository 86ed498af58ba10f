"""Expressive losses (De Palma et al. 2024): an attack's loss and interval bounds' in one."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.bounds import margins, verified
from robustprune_jax.objectives.objective import Objective, accuracy, eval_logits, label_loss
from robustprune_jax.objectives.ramps import fraction
from robustprune_jax.objectives.sabr import attacked_batch

# Below this cross-entropy float32's logarithm, and its derivative, say nothing.
LEAST_LOSS = 1e-7


def mtl_ibp(config) -> Objective:
    """Returns the objective alpha * CE(worst case of f, y) + (1 - alpha) * CE(f(x_adv), y).

    Reads config.mtl_ibp.alpha and what `_expressive` reads.
    """
    alpha, label_cost = config.mtl_ibp.alpha, label_loss(config)

    def loss(attacked, lower, labels):
        worst = cross_entropy(-lower, labels)
        return alpha * worst + (1 - alpha) * label_cost(attacked, labels)

    return _expressive(config, loss)


def cc_ibp(config) -> Objective:
    """Returns the objective CE of alpha * worst-case margins + (1 - alpha) * margins of f(x_adv).

    Reads config.cc_ibp.alpha and what `_expressive` reads.
    """
    alpha = config.cc_ibp.alpha

    def loss(attacked, lower, labels):
        # Logits are, up to a constant that cross-entropy does not see, less their margins.
        return cross_entropy((1 - alpha) * attacked - alpha * lower, labels)

    return _expressive(config, loss)


def exp_ibp(config) -> Objective:
    """Returns the objective CE(worst case of f, y) ^ alpha * CE(f(x_adv), y) ^ (1 - alpha).

    Reads config.exp_ibp.alpha and what `_expressive` reads.
    """
    alpha, label_cost = config.exp_ibp.alpha, label_loss(config)

    def loss(attacked, lower, labels):
        worst, reached = (
            jnp.log(jnp.maximum(loss, LEAST_LOSS))
            for loss in (cross_entropy(-lower, labels), label_cost(attacked, labels))
        )
        return jnp.exp(alpha * worst + (1 - alpha) * reached)

    return _expressive(config, loss)


def _expressive(config, loss_of: Callable[..., jax.Array]) -> Objective:
    """The objective loss_of(f(x_adv), lower bounds of margins, labels) -> [B], its mean.

    f(x_adv) is in training mode, bounds are by intervals in eval mode over factor_t * eps, clipped
    to [0, 1]; x_adv is attacked_batch's. Reads config.certified.
    """
    settings = config.certified

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        eps = fraction(settings.ramp, progress) * settings.eps
        attacked, batch_stats = logits_of(batch['adversarial'], train=True)
        radius = settings.factor_t * eps
        lower = margins(eval_logits(logits_of), images, labels, eps=radius, method='ibp')
        metrics = {
            'robust_accuracy': accuracy(attacked, labels),
            'verified_accuracy': jnp.mean(verified(lower)),
            'eps': eps,
        }
        return jnp.mean(loss_of(attacked, lower, labels)), (carry, batch_stats, metrics)

    return Objective(
        loss,
        inner=partial(attacked_batch, settings),
        certificate={'method': settings.validate_by, 'eps': settings.eps},
    )
