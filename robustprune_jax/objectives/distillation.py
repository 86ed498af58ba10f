"""Self-distillation: a pruned network learns the soft labels of the dense one that it came from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from robustprune_jax.objectives.objective import Objective, kl_divergence


def soft_labels(teacher: Callable[[jax.Array], jax.Array], batch: dict) -> dict:
    """Returns the teacher's logits of a batch's clean and, where there are any, attacked images, by
    these images' names."""
    return {name: teacher(batch[name]) for name in ('image', 'adversarial') if name in batch}


def distilled(objective: Objective, weight: float) -> Objective:
    """Returns the objective plus weight * KL(teacher(x) || f(x)), for clean images and for attacked
    ones, in training mode.

    The batch has soft_labels as 'teacher'.
    """
    if not weight:
        return objective

    def loss(logits_of, carry, batch, key, progress):
        total, rest = objective.loss(logits_of, carry, batch, key, progress)
        for name, target in batch['teacher'].items():
            logits, _ = logits_of(batch[name], train=True)
            total += weight * jnp.mean(kl_divergence(logits, target))
        return total, rest

    return objective._replace(loss=loss)
