"""What floating point may add to a bound: rigorous, whatever the order of its sums.

A sum of n products, computed in any order, with or without fused steps, is within gamma_n of the
sum of its terms' magnitudes, gamma_n = n u / (1 - n u), u the unit roundoff (Higham 2002, 3.1).
"""

import jax.numpy as jnp

from robustprune_jax.bounds.nodes import Array

# Roundings of a step beside those of its products: of `row_sum`, of chords and tangents, of the
# error term itself.
STEP = 48
# Numbers below are taken for this one, whose products are still far above what is flushed to 0.
FLOOR = 2.0**-30


def gamma(terms: int, dtype) -> float:
    """Returns the relative error of sums of so many products, inf where there is none: twice the
    roundings, as bounds are a difference of two sums and the error term is rounded too."""
    rounded = 2 * (terms + STEP) * float(jnp.finfo(dtype).eps) / 2
    return rounded / (1 - rounded) if rounded < 0.5 else float('inf')


def of_sum(total: Array) -> Array:
    """Returns how far rounding may move the sum of two numbers."""
    return 2 * jnp.finfo(total.dtype).eps * jnp.abs(total)


def size(lower: Array, upper: Array) -> Array:
    """Returns the largest magnitude between two bounds."""
    return jnp.maximum(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), FLOOR)


def row_sum(rows: Array) -> Array:
    """Returns the sum of each row [S] of [S, ...] by pairs: few roundings, in a known order."""
    rows = rows.reshape(len(rows), -1)
    while (width := rows.shape[1]) > 16:
        parts = jnp.split(jnp.pad(rows, ((0, 0), (0, -width % 16))), 16, axis=1)
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        (rows,) = parts
    return jnp.sum(rows, axis=1)


def loss(rows: Array, terms: int, magnitude: Array) -> Array:
    """Returns how far [S] rounding may move rows [S, ...] of a value, of a sum of `terms` terms of
    `magnitude` [...] in all."""
    total = jnp.abs(rows).reshape(len(rows), -1) @ magnitude.ravel() + FLOOR * jnp.sum(magnitude)
    return gamma(terms, rows.dtype) * (1 + gamma(magnitude.size, rows.dtype)) * total
