"""Wide residual networks: BatchNorm and ReLU come before each convolution."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import init
from .layers import batch_norm, conv, dense, normalise


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut. Where the width changes, the shortcut is a 1x1
    convolution of the activated input; elsewhere it is the input itself."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        active = nn.relu(batch_norm(x, train, 'bn1'))
        y = conv(active, self.features, 3, stride=self.stride, padding=1, name='conv1')
        y = nn.relu(batch_norm(y, train, 'bn2'))
        y = conv(y, self.features, 3, padding=1, name='conv2')
        if x.shape[-1] != self.features:
            x = conv(active, self.features, 1, stride=self.stride, name='conv_shortcut')
        return x + y


class WideResNet(nn.Module):
    """WRN-depth-widen: logits [B, num_classes].

    The last map (8x8 for 32x32 images) is averaged whole, so any image of at least 4x4 will do.
    Raises ValueError for smaller ones.
    """

    depth: int
    widen: int
    num_classes: int = 10
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        height, width = images.shape[1:3]
        if min(height, width) < 4:
            raise ValueError(
                f'{self.name or "WideResNet"}: images of {height}x{width} are too small; '
                'both sides must be at least 4'
            )
        x = normalise(images, self.mean, self.std)
        x = conv(x, 16, 3, padding=1, name='conv1')
        for group, (features, stride) in enumerate(((16, 1), (32, 2), (64, 2)), 1):
            for i in range((self.depth - 4) // 6):
                block = Block(
                    features * self.widen, stride if i == 0 else 1, name=f'block{group}_layer{i}'
                )
                x = block(x, train)
        x = nn.relu(batch_norm(x, train, 'bn1'))
        x = jnp.mean(x, axis=(1, 2))
        return dense(x, self.num_classes, bias=init.zero_bias, name='fc')


MODELS = {
    f'wrn_{depth}_{widen}': partial(WideResNet, depth=depth, widen=widen)
    for depth, widen in ((28, 10), (28, 4), (28, 1), (34, 10), (40, 2))
}
