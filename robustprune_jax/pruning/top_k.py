"""The largest of an array, and masks that let gradients through."""

import jax
import jax.numpy as jnp


def top_k_mask(magnitudes: jax.Array, k: int | jax.Array) -> jax.Array:
    """Returns the 0/1 mask of the k largest of `magnitudes` (>= 0), the lower flat index first.

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
def straight_through(score: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mask, with the score's gradient: identity in the mask, then through |score|."""
    return mask


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # Not the derivative of jnp.abs: at 0 that is 1, and the original's sign is 0.
    return primals[1], jnp.sign(primals[0]) * tangents[0]


def first_of_each(magnitudes: jax.Array, every: int) -> jax.Array:
    """Returns the magnitudes, the `every` largest of each output (the last axis) infinite."""
    if not every:
        return magnitudes
    columns = magnitudes.reshape(-1, magnitudes.shape[-1])
    rows = jax.lax.top_k(columns.T, min(every, len(columns)))[1].T
    columns = columns.at[rows, jnp.arange(columns.shape[1])].set(jnp.inf)
    return columns.reshape(magnitudes.shape)
