"""Masks that move while a sparse network trains: dynamic sparse training.

Every so often each layer drops the fraction rho of its live weights that are smallest, and makes as
many others live, of largest gradient (RigL, Evci et al., ICML 2020) or drawn (SET, Mocanu et al.,
2018; FlyingBird, Chen et al., ICLR 2022): its number stays, exactly. From rho at the start to
final * rho, over the part `until` of the phase,

    rho_t = rho * (final + (1 - final) * (1 + cos(pi * t)) / 2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.pruning.criterion import Kernels
from robustprune_jax.pruning.top_k import first_of_each, top_k_mask


class Dynamic(NamedTuple):
    """grow: a name of GROWTHS; interval: epochs between two moves; fraction, final: rho and final;
    until: the part of the phase after which the masks stay."""

    grow: str
    interval: float
    fraction: float
    final: float = 0.0
    until: float = 1.0


# What of a layer grows first: (its gradient, key) -> magnitudes
GROWTHS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'gradient': lambda slope, key: jnp.abs(slope),
    'random': lambda slope, key: jax.random.uniform(key, slope.shape, slope.dtype),
}


def move(
    kernels: Kernels,
    masks: Kernels,
    slopes: Kernels,
    dynamic: Dynamic,
    done: jax.Array | float,
    key: jax.Array,
    per_class: dict[tuple[str, ...], int],
) -> Kernels:
    """Returns the masks after a move.

    slopes: the loss's gradient to the masked weights, so of those that are not live too. done: t.
    per_class: how many of the largest weights of each output no move may drop, by path. What is
    dropped may grow at once, and then has stayed. Ties go to the lower index.
    """
    shape = dynamic.final + (1 - dynamic.final) * (1 + jnp.cos(jnp.pi * done)) / 2
    keys = dict(zip(sorted(masks), jax.random.split(key, len(masks)), strict=True))
    return {
        path: _moved(
            mask,
            jnp.abs(kernels[path]),
            GROWTHS[dynamic.grow](slopes[path], keys[path]),
            dynamic.fraction * shape,
            per_class.get(path, 0),
        )
        for path, mask in masks.items()
    }


def _moved(mask, magnitudes, worth, fraction, every):
    is_live, kept = mask > 0, jnp.count_nonzero(mask)
    # Live weights of size 0 come before all that are not live.
    live = jnp.maximum(magnitudes, jnp.finfo(mask.dtype).tiny)
    live = jnp.where(is_live, first_of_each(jnp.where(is_live, live, 0), every), 0)
    may_drop = kept - jnp.sum(jnp.isinf(live))
    dropped = jnp.minimum(jnp.floor(fraction * kept).astype(kept.dtype), may_drop)
    stay = top_k_mask(live, kept - dropped)
    return top_k_mask(jnp.where(stay > 0, jnp.inf, worth), kept)
