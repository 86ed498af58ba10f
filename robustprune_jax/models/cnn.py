"""Plain networks: strided convolutions, then dense layers, ReLU between them; and linear ones."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from . import init
from .layers import batch_norm, conv, dense, flatten, normalise


class ConvNet(nn.Module):
    """Convolutions and hidden dense layers with ReLU, then the logits [B, num_classes].

    convs: (features, size, stride, padding) of each; hidden: the widths of the hidden dense layers.
    bn: BatchNorm before every ReLU.
    Any image size that leaves a pixel will do, and any number of channels; the first dense layer
    takes its width from them.
    """

    convs: tuple[tuple[int, int, int, int], ...]
    hidden: tuple[int, ...]
    num_classes: int = 10
    conv_init: Callable = init.kaiming_normal
    conv_bias: Callable = init.zero_bias
    dense_init: Callable = init.torch_default  # of the hidden dense layers
    bn: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = normalise(images, self.mean, self.std)
        for i, (features, size, stride, padding) in enumerate(self.convs, 1):
            x = conv(
                x, features, size, stride=stride, padding=padding,
                kernel_init=self.conv_init, bias=self.conv_bias, name=f'conv{i}',
            )  # fmt: skip
            x = nn.relu(batch_norm(x, train, f'bn{i}') if self.bn else x)
        x = flatten(x)
        for i, features in enumerate(self.hidden, 1):
            x = dense(x, features, kernel_init=self.dense_init, name=f'dense{i}')
            x = nn.relu(batch_norm(x, train, f'bn{len(self.convs) + i}') if self.bn else x)
        return dense(x, self.num_classes, name=f'dense{len(self.hidden) + 1}')


class LinearNet(nn.Module):
    """Dense layers without non-linearity between them: logits [B, num_classes]."""

    hidden: tuple[int, ...]
    num_classes: int = 10
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = flatten(normalise(images, self.mean, self.std))
        for i, features in enumerate((*self.hidden, self.num_classes), 1):
            x = dense(x, features, name=f'dense{i}')
        return x


_SMALL = {'convs': ((16, 4, 2, 1), (32, 4, 2, 1)), 'hidden': (100,)}
_LARGE = {
    'convs': ((32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)),
    'hidden': (512, 512),
}
_VGG4 = {
    'convs': ((64, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1), (128, 3, 2, 1)),
    'hidden': (256, 256),
}
# Certified training's (Shi et al. 2021; De Palma et al. 2024).
_CNN5 = {'convs': ((64, 3, 1, 1), (64, 4, 2, 1), (128, 4, 2, 1)), 'hidden': (512,)}
_CNN7 = {
    'convs': ((64, 3, 1, 1), (64, 3, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)),
    'hidden': (512,),
}
_FOR_BOUNDS = {
    'conv_init': init.bounds_normal,
    'conv_bias': init.torch_default_bias,
    'dense_init': init.bounds_normal,
}
_TORCH_DEFAULT = {'conv_init': init.torch_default, 'conv_bias': init.torch_default_bias}

MODELS = {
    'mnist_model': partial(ConvNet, **_SMALL, **_TORCH_DEFAULT),
    'mnist_model_large': partial(ConvNet, **_LARGE, **_TORCH_DEFAULT),
    'cifar_model': partial(ConvNet, **_SMALL),
    'cifar_model_large': partial(ConvNet, **_LARGE),
    'vgg4_without_maxpool': partial(ConvNet, **_VGG4),
    'cnn5': partial(ConvNet, **_CNN5, **_FOR_BOUNDS),
    'cnn5_bn': partial(ConvNet, **_CNN5, **_FOR_BOUNDS, bn=True),
    'cnn7': partial(ConvNet, **_CNN7, **_FOR_BOUNDS),
    'cnn7_bn': partial(ConvNet, **_CNN7, **_FOR_BOUNDS, bn=True),
    'lin_1': partial(LinearNet, hidden=()),
    'lin_2': partial(LinearNet, hidden=(100,)),
    'lin_3': partial(LinearNet, hidden=(100, 100)),
    'lin_4': partial(LinearNet, hidden=(100, 100)),
}
