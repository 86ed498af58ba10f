"""Free adversarial training (Shafahi et al. 2019): one backward pass for weights and images."""

import jax.numpy as jnp
import numpy as np

from robustprune_jax.attacks import NORMS
from robustprune_jax.objectives.objective import Objective, accuracy, label_loss


def free(config) -> Objective:
    """Returns the objective CE(f(clip(x + delta)), y), with n_repeats updates on each batch.

    The gradient of each update also moves delta, by eps times its sign, within the l_inf ball of
    eps. delta [B, H, W, C], one for each place in a batch, starts at 0 and lives on from batch to
    batch and from epoch to epoch (the original's starts again at 0 in every epoch). Reads
    config.free.n_repeats and config.attack: eps for training, all of it for validation.
    """
    eps, norm, label_cost = config.attack.eps, NORMS['linf'], label_loss(config)

    def loss(logits_of, delta, batch, key, progress):
        attacked, batch_stats = logits_of(jnp.clip(batch['image'] + delta, 0, 1), train=True)
        metrics = {'robust_accuracy': accuracy(attacked, batch['label'])}
        return jnp.mean(label_cost(attacked, batch['label'])), (delta, batch_stats, metrics)

    return Objective(
        loss,
        init_carry=lambda shape: np.zeros(shape, np.float32),
        ascend=lambda delta, gradient: norm.project(delta + eps * norm.direction(gradient), 0, eps),
        repeats=config.free.n_repeats,
        attack=dict(config.attack),
    )
