"""Cross-entropy on clean images (the original's `base`)."""

import jax.numpy as jnp

from robustprune_jax.objectives.objective import Objective, accuracy, label_loss


def natural(config) -> Objective:
    """Returns the objective CE(f(x), y)."""
    label_cost = label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        logits, batch_stats = logits_of(batch['image'], train=True)
        metrics = {'accuracy': accuracy(logits, batch['label'])}
        return jnp.mean(label_cost(logits, batch['label'])), (carry, batch_stats, metrics)

    return Objective(loss)
