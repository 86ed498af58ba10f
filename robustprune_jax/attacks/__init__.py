"""Attacks on any logits function, in pixel units.

    images = pgd(logits_fn, key, images, labels, eps=8 / 255, step_size=2 / 255, steps=20)
    images, accuracy_after = standard(logits_fn, key, images, labels, eps=8 / 255)
    images, distances = fmn(logits_fn, images, labels, norm='l2')

`logits_fn` maps images [B, H, W, C] to logits [B, K]. A `jax.tree_util.Partial(apply, variables)`
keeps weights out of the compiled program; a plain callable is wrapped.
"""

from robustprune_jax.attacks.adapters import from_callable, from_torch, save
from robustprune_jax.attacks.fmn import fmn
from robustprune_jax.attacks.pgd import LOSSES, NORMS, Norm, cross_entropy, margin, pgd
from robustprune_jax.attacks.standard import (
    ATTACKS,
    ENSEMBLES,
    FAST,
    RAND,
    STANDARD,
    accuracy_after,
    in_order,
    standard,
)

__all__ = [
    'ATTACKS',
    'ENSEMBLES',
    'FAST',
    'LOSSES',
    'NORMS',
    'RAND',
    'STANDARD',
    'Norm',
    'accuracy_after',
    'cross_entropy',
    'fmn',
    'from_callable',
    'from_torch',
    'in_order',
    'margin',
    'pgd',
    'save',
    'standard',
]
