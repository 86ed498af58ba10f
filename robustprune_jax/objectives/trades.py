"""TRADES (Zhang et al. 2019), l_inf and l_2: what the original calls `adv`."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from robustprune_jax import attacks
from robustprune_jax.objectives.objective import (
    Objective,
    accuracy,
    frozen_logits,
    kl_divergence,
    label_loss,
    normal_noise,
)

START_NOISE = 0.001  # standard deviation of the attack's start around the image, in pixel units


def _kl_to(clean_logits, logits, labels):
    return kl_divergence(logits, clean_logits)


def trades(config) -> Objective:
    """Returns the objective CE(f(x), y) + beta * KL(f(x) || f(x_adv)), both in training mode.

    x_adv ascends the KL from the clean prediction, against the eval-mode network. Reads
    config.attack (eps, step_size, steps, norm) and config.trades: beta; detach_target, whether no
    gradient flows through the clean side of the KL (the original lets it flow); bn_updates,
    'clean_attacked' or 'original', how the BatchNorm statistics move.
    """
    attack, settings, label_cost = dict(config.attack), config.trades, label_loss(config)

    def logged(logits_of, images):
        """BatchNorm's statistics after the original's forward pass for the log."""
        return logits_of(images, train=True)[1] if settings.bn_updates == 'original' else None

    def inner(logits_of, batch, key, progress):
        images = batch['image']
        network = frozen_logits(logits_of, logged(logits_of, images))
        adversarial = attacks.pgd(
            network,
            key,
            images,
            batch['label'],
            start=images + START_NOISE * normal_noise(batch, key),
            loss=Partial(_kl_to, network(images)),
            **attack,
        )
        return {**batch, 'adversarial': adversarial}

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        batch_stats = logged(logits_of, images)
        clean, batch_stats = logits_of(images, train=True, batch_stats=batch_stats)
        attacked, batch_stats = logits_of(batch['adversarial'], train=True, batch_stats=batch_stats)
        if settings.bn_updates == 'original':
            _, batch_stats = logits_of(images, train=True, batch_stats=batch_stats)
        target = jax.lax.stop_gradient(clean) if settings.detach_target else clean
        natural = jnp.mean(label_cost(clean, labels))
        robust = jnp.mean(kl_divergence(attacked, target))
        metrics = {
            'accuracy': accuracy(clean, labels),
            'robust_accuracy': accuracy(attacked, labels),
        }
        return natural + settings.beta * robust, (carry, batch_stats, metrics)

    return Objective(loss, inner=inner, attack=attack)
