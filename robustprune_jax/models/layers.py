"""The layers all families share, with PyTorch's padding and constants, for `nn.compact` methods."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import init


def normalise(images: jax.Array, mean: tuple | None, std: tuple | None) -> jax.Array:
    """Returns (images - mean) / std per channel; the images themselves where both are None."""
    if images.ndim != 4:
        raise ValueError(f'images must have shape [B, H, W, C], not {images.shape}')
    if mean is None and std is None:
        return images
    channels = images.shape[-1]
    if mean is None or std is None or not len(mean) == len(std) == channels:
        raise ValueError(
            f'mean {mean} and std {std} must have a value for each of {channels} channels'
        )
    return (images - jnp.array(mean, images.dtype)) / jnp.array(std, images.dtype)


def conv(
    x: jax.Array,
    features: int,
    size: int,
    *,
    name: str,
    stride: int = 1,
    padding: int = 0,
    kernel_init: Callable = init.kaiming_normal,
    bias: Callable | None = None,
) -> jax.Array:
    """Returns a size x size convolution of x, [B, H, W, features]; no bias where `bias` is None.

    The padding is the same number of pixels on all four sides, as in PyTorch: 'SAME' would pad
    strided convolutions on one side only. Raises ValueError where not one window fits.
    """
    height, width = x.shape[1:3]
    if min(height, width) + 2 * padding < size:
        raise ValueError(
            f'the images are too small: {name} is {size}x{size} and gets a {height}x{width} map'
        )
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=bias is not None,
        kernel_init=kernel_init,
        bias_init=(bias or init.zero_bias)(x.shape[-1] * size * size),
        conv_general_dilated=_conv,
        name=name,
    )(x)


def _conv(x, kernel, strides, padding, **settings):
    """As lax.conv_general_dilated, in another way where that is slow on CPU (jax 0.10.2)."""

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)

    def of_blocks(x, kernel):
        blocks = _blocks(x, kernel, padding)
        return jax.lax.conv_general_dilated(*blocks, (1, 1), 'VALID', **settings)

    def product(x, kernel):
        return _product(x, kernel, strides, padding)

    outputs = jax.eval_shape(plain, x, kernel).shape
    if max(outputs[1:3]) <= 2:
        # XLA's own, or its derivatives, take 10 to 70 times as long.
        on_cpu = product
    elif tuple(strides) == (2, 2) and min(kernel.shape[:2]) > 3:
        # XLA's derivative by the input puts zeros between the pixels of the gradient and multiplies
        # them too: three in four. It is slow on few channels, too. Kernels of 3 gain nothing.
        on_cpu = of_blocks
    else:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def _product(x, kernel, strides, padding):
    """Of all windows with the kernel, as one matrix product."""
    height, width = kernel.shape[:2]
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    rows, columns = (
        (pixels - size) // stride * stride + 1
        for pixels, size, stride in zip(x.shape[1:3], (height, width), strides, strict=True)
    )
    windows = [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _blocks(x, kernel, padding):
    """Image and kernel with 2 x 2 blocks of pixels as channels: a stride of 2 is 1 then."""
    (height, width, channels, features), sizes = kernel.shape, x.shape[1:3]
    blocks = -(-height // 2), -(-width // 2)
    kernel = jnp.pad(kernel, [(0, height % 2), (0, width % 2), (0, 0), (0, 0)])
    kernel = kernel.reshape(blocks[0], 2, blocks[1], 2, channels, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*blocks, 4 * channels, features)
    ends = []
    for (low, high), pixels, size, block in zip(
        padding, sizes, (height, width), blocks, strict=True
    ):
        outputs = (pixels + low + high - size) // 2 + 1
        ends.append((low, 2 * (outputs - 1 + block) - pixels - low, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
    count, rows, columns, _ = x.shape
    x = x.reshape(count, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, rows // 2, columns // 2, 4 * channels), kernel


def dense(
    x: jax.Array,
    features: int,
    *,
    name: str,
    kernel_init: Callable = init.torch_default,
    bias: Callable = init.torch_default_bias,
) -> jax.Array:
    """Returns a dense layer of x, [B, features]."""
    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias(x.shape[-1]), name=name)(x)


def batch_norm(x: jax.Array, train: bool, name: str) -> jax.Array:
    """Returns x normalised by the batch's statistics (train) or by the running ones.

    PyTorch moves its running variance by the unbiased batch variance, Flax by the biased one; the
    outputs are the same.
    """
    return _BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)(x)


class _BatchNorm(nn.BatchNorm):
    """Flax's, with sums over pixels that are fast on CPU in training."""

    @nn.compact
    def __call__(self, x):
        if self.use_running_average or self.is_initializing():
            return super().__call__(x)
        scale, bias = (self.get_variable('params', name) for name in ('scale', 'bias'))
        y, *statistics = _normalise_batch(x, scale, bias, self.epsilon)
        for name, value in zip(('mean', 'var'), statistics, strict=True):
            running = self.get_variable('batch_stats', name)
            moved = self.momentum * running + (1 - self.momentum) * value
            self.put_variable('batch_stats', name, moved)
        return y


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise_batch(x, scale, bias, epsilon):
    """Returns x normalised by its own mean and variance, and these, which carry no gradient."""
    return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[-1]
    mean = _channel_sums(wide) / count
    # Not the mean square less the squared mean: where the mean is large these are nearly equal.
    centred = wide - mean
    var = _channel_sums(centred * centred) / count
    inverse = jax.lax.rsqrt(var + epsilon)
    y = centred * (inverse * scale) + bias
    return (y.astype(x.dtype), mean, var), (x, mean, inverse, scale)


def _normalise_backward(epsilon, residuals, gradients):
    x, mean, inverse, scale = residuals
    gradient, centred = gradients[0].astype(mean.dtype), x.astype(mean.dtype) - mean
    count = x.size // x.shape[-1]
    of_bias, of_scale = _channel_sums(gradient), _channel_sums(gradient * centred) * inverse
    of_x = gradient - (of_bias + centred * (of_scale * inverse)) / count
    of_x = (of_x * (inverse * scale)).astype(x.dtype)
    return of_x, of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


_normalise_batch.defvjp(_normalise_forward, _normalise_backward)


def _channel_sums(x):
    """Sums over all axes but the last: a matrix product, which on CPU is up to 5 times faster than
    a sum of products. Elsewhere products round more."""
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.platform_dependent(
        rows, cpu=lambda x: jnp.ones(len(x), x.dtype) @ x, default=partial(jnp.sum, axis=0)
    )


def max_pool(x: jax.Array) -> jax.Array:
    """Returns the maxima [B, H // 2, W // 2, C] of 2 x 2 pixels."""

    def of_slices(x):
        # XLA's derivative takes 10 times as long on CPU. As there, the first of equals has it.
        rows, columns = (size // 2 * 2 for size in x.shape[1:3])
        a, b, c, d = (x[:, i:rows:2, j:columns:2] for i in range(2) for j in range(2))
        upper, lower = jnp.where(b > a, b, a), jnp.where(d > c, d, c)
        return jnp.where(lower > upper, lower, upper)

    plain = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    return jax.lax.platform_dependent(x, cpu=of_slices, default=plain)


def flatten(x: jax.Array) -> jax.Array:
    """Returns [B, H*W*C], in that order; conversion/ permutes to PyTorch's C*H*W."""
    return x.reshape(x.shape[0], -1)
