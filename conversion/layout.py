"""Kernels between Flax's layout and torch's: transpositions only, views wherever possible."""

import math

import numpy as np

from .names import Layer, Leaf


def to_torch(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Returns a Flax leaf as the torch tensor `leaf`."""
    if leaf.kernel is None:
        return array
    if leaf.kernel.kind == 'flatten':
        width, out = array.shape
        channels = flat_channels(width, leaf.kernel)
        return array.reshape(-1, channels, out).transpose(2, 1, 0).reshape(out, width)
    # spatial..., in, out  ->  out, in, spatial...
    return np.moveaxis(array, (-1, -2), (0, 1))


def from_torch(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """Returns the torch tensor `leaf` as the Flax leaf."""
    if leaf.kernel is None:
        return array
    if leaf.kernel.kind == 'flatten':
        out, width = array.shape
        channels = flat_channels(width, leaf.kernel)
        return array.reshape(out, channels, -1).transpose(2, 1, 0).reshape(width, out)
    return np.moveaxis(array, (0, 1), (-1, -2))


def torch_shape(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    """Returns the torch shape of a Flax leaf."""
    return shape if leaf.kernel is None else (shape[-1], shape[-2], *shape[:-2])


def flat_channels(width: int, layer: Layer) -> int:
    """Returns C of a flattened C*H*W map; of an image 3, or 1 where only that leaves a square."""
    if layer.channels is not None:
        return layer.channels
    return 3 if width % 3 == 0 and math.isqrt(width // 3) ** 2 == width // 3 else 1


def flat_width(width: int, layer: Layer) -> int:
    """Returns the nearest width to this one that the flattened map can have."""
    channels = flat_channels(width, layer)
    return channels * (layer.pixels or max(1, round(width / channels)))
