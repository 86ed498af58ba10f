"""Residual networks for CIFAR (resnet18 ...) and ImageNet (ResNet18 ...), and a plain one."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import init
from .layers import batch_norm, conv, dense, flatten, normalise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions, or with `bottleneck` 1x1, 3x3, 1x1, around a shortcut.

    The shortcut is a 1x1 convolution with BatchNorm where the stride or the width changes.
    """

    features: int
    stride: int
    bottleneck: bool
    conv_init: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # (features, size, stride) of each convolution
        if self.bottleneck:
            plan = (
                (self.features, 1, 1),
                (self.features, 3, self.stride),
                (4 * self.features, 1, 1),
            )
        else:
            plan = ((self.features, 3, self.stride), (self.features, 3, 1))
        y = x
        for i, (features, size, stride) in enumerate(plan, 1):
            y = nn.relu(y) if i > 1 else y
            y = conv(
                y, features, size, stride=stride, padding=size // 2,
                kernel_init=self.conv_init, name=f'conv{i}',
            )  # fmt: skip
            y = batch_norm(y, train, f'bn{i}')
        if x.shape != y.shape:
            x = conv(
                x, y.shape[-1], 1, stride=self.stride,
                kernel_init=self.conv_init, name='shortcut_conv',
            )  # fmt: skip
            x = batch_norm(x, train, 'shortcut_bn')
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Four groups of blocks: logits [B, num_classes]. The last map is averaged whole.

    imagenet_stem: 7x7 convolution of stride 2 and 3x3 max-pooling, where the CIFAR form has one
    3x3 convolution. Raises ValueError for images too small for all the strides.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    imagenet_stem: bool
    num_classes: int = 10
    conv_init: Callable = init.torch_default
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        height, width = images.shape[1:3]
        smallest = 32 if self.imagenet_stem else 8
        if min(height, width) < smallest:
            raise ValueError(
                f'{self.name or "ResNet"}: images of {height}x{width} are too small; '
                f'both sides must be at least {smallest}'
            )
        x = normalise(images, self.mean, self.std)
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        x = conv(
            x, 64, size, stride=stride, padding=size // 2, kernel_init=self.conv_init, name='conv1'
        )
        x = nn.relu(batch_norm(x, train, 'bn1'))
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for group, count in enumerate(self.blocks):
            for i in range(count):
                block = Block(
                    64 * 2**group, 2 if group > 0 and i == 0 else 1, self.bottleneck,
                    self.conv_init, name=f'layer{group + 1}_block{i}',
                )  # fmt: skip
                x = block(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return dense(x, self.num_classes, name='fc')


class PlainBlock(nn.Module):
    """relu(shortcut(x) + conv2(relu(conv1(x)))), biases and no BatchNorm; both paths convolve."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = partial(conv, features=self.features, bias=init.zero_bias)
        # strided: kernels one wider, so that every pixel is seen equally often
        extra = self.stride - 1
        y = nn.relu(layer(x, size=3 + extra, stride=self.stride, padding=1, name='conv1'))
        y = layer(y, size=3, padding=1, name='conv2')
        shortcut = layer(x, size=1 + extra, stride=self.stride, name='conv_shortcut')
        return nn.relu(shortcut + y)


class PlainResNet(nn.Module):
    """A residual network of convolutions, ReLUs and dense layers only: logits [B, num_classes]."""

    num_classes: int = 10
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = normalise(images, self.mean, self.std)
        x = nn.relu(conv(x, 16, 3, padding=1, bias=init.zero_bias, name='conv1'))
        for group, (features, count) in enumerate(((160, 6), (320, 5), (640, 5)), 1):
            for i in range(count):
                stride = 2 if group > 1 and i == 0 else 1
                x = PlainBlock(features, stride, name=f'block{group}_layer{i}')(x)
        x = nn.relu(dense(flatten(x), 1000, name='dense1'))
        return dense(x, self.num_classes, name='dense2')


# depth: (blocks per group, bottleneck)
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}

MODELS = {
    **{
        f'resnet{depth}': partial(ResNet, blocks=blocks, bottleneck=bottleneck, imagenet_stem=False)
        for depth, (blocks, bottleneck) in DEPTHS.items()
    },
    **{
        f'ResNet{depth}': partial(
            ResNet,
            blocks=DEPTHS[depth][0],
            bottleneck=DEPTHS[depth][1],
            imagenet_stem=True,
            conv_init=init.kaiming_normal,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        for depth in (18, 34, 50)
    },
    'cifar_model_resnet': PlainResNet,
}
