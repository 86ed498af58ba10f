"""Stability training for randomized smoothing (Li et al. 2019): the original's `smooth`."""

import jax.numpy as jnp

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.objectives.objective import Objective, accuracy, kl_divergence, normal_noise


def smooth(config) -> Objective:
    """Returns the objective CE(f(x), y) + beta * KL(f(x) || f(x + sigma * noise)).

    Both in training mode, the noise not clipped, a gradient through both sides of the KL.
    Reads config.smooth: sigma, in pixel units, and beta.
    """
    sigma, beta = config.smooth.sigma, config.smooth.beta

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        clean, batch_stats = logits_of(images, train=True)
        noisy_images = images + sigma * normal_noise(batch, key)
        noisy, batch_stats = logits_of(noisy_images, train=True, batch_stats=batch_stats)
        stability = jnp.mean(kl_divergence(noisy, clean))
        metrics = {
            'accuracy': accuracy(clean, labels),
            'noisy_accuracy': accuracy(noisy, labels),
        }
        total = jnp.mean(cross_entropy(clean, labels)) + beta * stability
        return total, (carry, batch_stats, metrics)

    return Objective(loss)
