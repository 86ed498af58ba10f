"""SABR (Mueller et al. 2023): interval bounds on a small box, where an attack found it weakest."""

from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from robustprune_jax import attacks
from robustprune_jax.attacks import cross_entropy
from robustprune_jax.bounds import margins, verified
from robustprune_jax.objectives.objective import (
    LogitsOf,
    Objective,
    Progress,
    accuracy,
    eval_logits,
    frozen_logits,
)
from robustprune_jax.objectives.ramps import fraction


def sabr(config) -> Objective:
    """Returns the objective CE(worst case of f in the box of radius tau around c, y).

    tau is `part` of the bounds' radius factor_t * eps, and c the attacked image, moved so that the
    box lies in that ball: clip(x_adv, x - factor_t * eps + tau, x + factor_t * eps - tau). The
    bounds are by intervals in eval mode, the box clipped to [0, 1]; a clean pass moves BatchNorm's
    statistics. Reads config.sabr.part (the paper's lambda) and config.certified.
    """
    settings, part = config.certified, config.sabr.part

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        eps = fraction(settings.ramp, progress) * settings.eps
        clean, batch_stats = logits_of(images, train=True)
        radius = settings.factor_t * eps
        room = (1 - part) * radius
        center = jnp.clip(batch['adversarial'], images - room, images + room)
        network = eval_logits(logits_of)
        lower = margins(network, center, labels, eps=part * radius, method='ibp')
        metrics = {
            'accuracy': accuracy(clean, labels),
            'box_verified_accuracy': jnp.mean(verified(lower)),  # of the small box only
            'eps': eps,
        }
        return jnp.mean(cross_entropy(-lower, labels)), (carry, batch_stats, metrics)

    return Objective(
        loss,
        inner=partial(attacked_batch, settings),
        certificate={'method': settings.validate_by, 'eps': settings.eps},
    )


def attacked_batch(
    settings: ConfigDict, logits_of: LogitsOf, batch: dict, key: jax.Array, progress: Progress
) -> dict:
    """Returns the batch with 'adversarial', images [B, H, W, C] that PGD moved by up to factor_a *
    eps in l_inf, with eps where the ramp is.

    It starts at random and attacks the cross-entropy of the eval-mode network, `steps` steps of
    step_size times that radius. settings: config.certified.
    """
    eps = fraction(settings.ramp, progress) * settings.eps
    radius = settings.factor_a * eps
    adversarial = attacks.pgd(
        frozen_logits(logits_of),
        key,
        batch['image'],
        batch['label'],
        eps=radius,
        step_size=settings.step_size * radius,
        steps=settings.steps,
    )
    return {**batch, 'adversarial': adversarial}
