"""What is kept or removed as one: single weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _top_k_mask(magnitudes, k):
    """0/1 mask of the k largest of `magnitudes` (>= 0); among equals the lower flat index wins.

    The bit patterns of non-negative floats are ordered as integers, so the k-th largest value is
    found by bisection on its bits: one counting pass per bit, whatever the density (`lax.top_k`
    slows down as k grows, a sort is ten times dearer), and exact where values are equal.
    """
    bits = jnp.finfo(magnitudes.dtype).bits
    patterns = jax.lax.bitcast_convert_type(magnitudes.ravel(), jnp.dtype(f'int{bits}'))

    def set_bit(i, threshold):
        candidate = threshold | (jnp.ones((), patterns.dtype) << (bits - 2 - i))
        return jnp.where(jnp.sum(patterns >= candidate) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, bits - 1, set_bit, jnp.zeros((), patterns.dtype))
    above, equal = patterns > threshold, patterns == threshold
    room = k - jnp.sum(above)

    def first(equal):
        return equal & (jnp.cumsum(equal) <= room)

    def where_needed(equal):
        # On CPU the running sum takes as long as the bisection, and seldom have equals to compete.
        # Elsewhere a condition would make the host wait.
        return jax.lax.cond(jnp.sum(equal) == room, lambda equal: equal, first, equal)

    mask = above | jax.lax.platform_dependent(equal, cpu=where_needed, default=first)
    return mask.reshape(magnitudes.shape).astype(magnitudes.dtype)


@jax.custom_jvp
def _straight_through(scores, kept):
    return _top_k_mask(jnp.abs(scores), kept)


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # Not the derivative of jnp.abs: at 0 that is 1, and the original's sign is 0.
    return _straight_through(*primals), jnp.sign(primals[0]) * tangents[0]


def weights(scores: dict, kept: dict) -> dict:
    """Returns masks that keep the `kept` weights of largest |score| in each leaf."""
    return jax.tree.map(_straight_through, scores, kept)


# name -> (scores, kept weights of each leaf) -> 0/1 masks with straight-through gradients
STRUCTURES: dict[str, Callable[[dict, dict], dict]] = {'weights': weights}
