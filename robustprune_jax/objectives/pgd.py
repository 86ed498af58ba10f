"""Adversarial training on PGD examples (Madry et al. 2018)."""

import jax.numpy as jnp

from robustprune_jax import attacks
from robustprune_jax.objectives.objective import Objective, accuracy, frozen_logits, label_loss


def pgd(config) -> Objective:
    """Returns the objective CE(f(x_adv), y), with x_adv by PGD against the eval-mode network.

    Reads config.attack: eps, step_size, steps, norm. The clean training-mode pass, which moves the
    BatchNorm statistics first and gives the clean accuracy, carries no gradient.
    """
    attack, label_cost = dict(config.attack), label_loss(config)

    def inner(logits_of, batch, key, progress):
        network = frozen_logits(logits_of)
        adversarial = attacks.pgd(network, key, batch['image'], batch['label'], **attack)
        return {**batch, 'adversarial': adversarial}

    def loss(logits_of, carry, batch, key, progress):
        labels = batch['label']
        clean, batch_stats = logits_of(batch['image'], train=True)
        attacked, batch_stats = logits_of(batch['adversarial'], train=True, batch_stats=batch_stats)
        metrics = {
            'accuracy': accuracy(clean, labels),
            'robust_accuracy': accuracy(attacked, labels),
        }
        return jnp.mean(label_cost(attacked, labels)), (carry, batch_stats, metrics)

    return Objective(loss, inner=inner, attack=attack)
