"""The transposed convolution as a few matrix products.

The weight gradient of a strided transposed convolution, which training through backward bounds
needs for every row, took XLA's CPU backend 25 times as long as the convolution itself (jax 0.10.2).
Written with matrix products, so are all its derivatives.
"""

import jax
import jax.numpy as jnp

from robustprune_jax.runtime import compiler


def transpose(eqn, weights: jax.Array):
    """Returns rows -> (the convolution's transpose applied to them,), or None to leave it to XLA.

    None: on accelerators, and for dilated, grouped or other than NHWC x HWIO convolutions.
    """
    p = eqn.params
    numbers = p['dimension_numbers']
    kernel, stride = weights.shape[:2], p['window_strides']
    if (
        compiler.backend() != 'cpu'
        or (numbers.lhs_spec, numbers.rhs_spec) != ((0, 3, 1, 2), (3, 2, 0, 1))
        or numbers.out_spec != (0, 3, 1, 2)
        or {*p['lhs_dilation'], *p['rhs_dilation']} != {1}
        or p['feature_group_count'] != 1
        or p['batch_group_count'] != 1
    ):
        return None
    size = eqn.invars[0].aval.shape[1:3]
    blocks = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
    fill = [(0, t * s - k) for t, s, k in zip(blocks, stride, kernel, strict=True)]

    def apply(rows):
        # Output entry o reaches the entries o * stride + k of the padded image. With
        # k = t * stride + b that is place b of block o + t: one product for each t.
        w = jnp.pad(weights, (*fill, (0, 0), (0, 0)))
        w = w.reshape(blocks[0], stride[0], blocks[1], stride[1], *w.shape[2:])
        total = 0
        for t in range(blocks[0]):
            for u in range(blocks[1]):
                shifts = (t, blocks[0] - 1 - t), (u, blocks[1] - 1 - u)
                shifted = jnp.pad(rows, ((0, 0), *shifts, (0, 0)))
                total += jnp.einsum('nhwo,bcio->nhwbci', shifted, w[t, :, u])
        n, h, width, *_, channels = total.shape
        image = total.transpose(0, 1, 3, 2, 4, 5)
        image = image.reshape(n, h * stride[0], width * stride[1], channels)
        for axis, (low, _) in enumerate(p['padding'], 1):
            end = low + size[axis - 1]
            widths = [(0, 0)] * 4
            widths[axis] = (0, max(0, end - image.shape[axis]))
            image = jax.lax.slice_in_dim(jnp.pad(image, widths), low, end, axis=axis)
        return (image,)

    return apply
