"""Products with matrices whose rows each see a window of the pixels, as those of convolutions do.

Neighbouring units see neighbouring pixels, in the order of the image's rows: a block of units needs
only the span of pixels that some of it sees.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.bounds.nodes import Array

BLOCK = 32  # units; of 16 to 128 the fastest on CPU, half the time of the whole matrix
STEPS = 16  # widths are multiples of so many parts of the image, so that few programs serve all


class Windows(NamedTuple):
    """A matrix [G * BLOCK, P] of which block g is values[g], [BLOCK, W], from column starts[g]."""

    starts: Array
    values: Array


def windows(matrix: np.ndarray) -> Windows:
    """Returns the windows of a matrix [U, P], U a multiple of BLOCK."""
    pixels = matrix.shape[1]
    blocks = matrix.reshape(-1, BLOCK, pixels)
    seen = (blocks != 0).any(axis=1)
    first = np.where(seen.any(axis=1), seen.argmax(axis=1), 0)
    after = np.where(seen.any(axis=1), pixels - seen[:, ::-1].argmax(axis=1), 0)
    step = -(-pixels // STEPS)
    width = min(-(-max(1, (after - first).max()) // step) * step, pixels)
    starts = np.minimum(first, pixels - width)
    values = [block[:, s : s + width] for block, s in zip(blocks, starts, strict=True)]
    return Windows(starts, np.stack(values))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(rows: Array, matrix: Windows, pixels: int) -> Array:
    """Returns rows [D, U] @ the matrix, [D, pixels]. Differentiable in the rows only."""

    def add(total, part):
        row, start, values = part
        window = jax.lax.dynamic_slice_in_dim(total, start, values.shape[1], 1) + row @ values
        return jax.lax.dynamic_update_slice_in_dim(total, window, start, 1), None

    total = jnp.zeros((len(rows), pixels), rows.dtype)
    blocked = rows.reshape(len(rows), -1, BLOCK).swapaxes(0, 1)
    return jax.lax.scan(add, total, (blocked, *matrix))[0]


def _forward(rows, matrix, pixels):
    return product(rows, matrix, pixels), matrix


def _backward(pixels, matrix, gradient):
    def of_block(part):
        start, values = part
        return jax.lax.dynamic_slice_in_dim(gradient, start, values.shape[1], 1) @ values.T

    blocked = jax.lax.map(of_block, tuple(matrix))
    return blocked.swapaxes(0, 1).reshape(len(gradient), -1), None


product.defvjp(_forward, _backward)
