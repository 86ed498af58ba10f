"""The layers all families share, with PyTorch's padding and constants, for `nn.compact` methods."""

from collections.abc import Callable

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
    strided convolutions on one side only.
    """
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=bias is not None,
        kernel_init=kernel_init,
        bias_init=(bias or init.zero_bias)(x.shape[-1] * size * size),
        name=name,
    )(x)


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
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)(x)


def flatten(x: jax.Array) -> jax.Array:
    """Returns [B, H*W*C], in that order; conversion/ permutes to PyTorch's C*H*W."""
    return x.reshape(x.shape[0], -1)
