"""Cross-entropy on clean images (the original's `base`)."""

import jax.numpy as jnp

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.objectives.objective import Objective, accuracy


def natural(config) -> Objective:
    """Returns the objective CE(f(x), y)."""

    def loss(logits_of, carry, batch, key, progress):
        logits, batch_stats = logits_of(batch['image'], train=True)
        metrics = {'accuracy': accuracy(logits, batch['label'])}
        return jnp.mean(cross_entropy(logits, batch['label'])), (carry, batch_stats, metrics)

    return Objective(loss)
