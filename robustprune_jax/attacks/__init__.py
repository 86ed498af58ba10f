"""Attacks on any logits function, in pixel units.

    images = pgd(logits_fn, key, images, labels, eps=8 / 255, step_size=2 / 255, steps=20)

`logits_fn` maps images [B, H, W, C] to logits [B, K]. A `jax.tree_util.Partial(apply, variables)`
keeps weights out of the compiled program; a plain callable is wrapped.
"""

from robustprune_jax.attacks.pgd import LOSSES, NORMS, cross_entropy, margin, pgd

__all__ = ['LOSSES', 'NORMS', 'cross_entropy', 'margin', 'pgd']
