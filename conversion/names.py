"""Which Flax leaf is which torch tensor: one table per family, in torch's state-dict order.

A table is a list of layers; a network of your own can bring its table too. Shapes are converted
by the layer's kind alone:

    kind     Flax kernel           torch weight
    conv     H, W, in, out         out, in, H, W
    dense    in, out               out, in
    flatten  H*W*C, out            out, C*H*W        the first dense layer
    norm     vectors and scalars, unchanged
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustprune_jax.models.resnet import DEPTHS
from robustprune_jax.models.vgg import PLANS
from robustprune_jax.runtime.registry import lookup

KINDS = ('conv', 'dense', 'flatten', 'norm')


class Layer(NamedTuple):
    """One layer: its torch module name, its Flax path, and what it is.

    flax is None for a layer that torch registers and never uses. For 'flatten', `channels` is C
    (None: the input image's) and `pixels` is H*W (None: as the image's size has it).
    """

    torch: str
    flax: str | None
    kind: str
    bias: bool = False
    channels: int | None = None
    pixels: int | None = None


class Leaf(NamedTuple):
    """One tensor: its torch name and, where it has a counterpart, its Flax collection and path.

    kernel: the layer that a kernel or its scores belong to, None for tensors that stay unchanged.
    """

    torch: str
    collection: str | None
    path: str | None
    kernel: Layer | None = None


def conv(torch: str, flax: str | None, bias: bool = False) -> Layer:
    return Layer(torch, flax, 'conv', bias)


def dense(torch: str, flax: str) -> Layer:
    return Layer(torch, flax, 'dense', bias=True)


def flat_dense(torch: str, flax: str, channels: int | None, pixels: int | None = None) -> Layer:
    return Layer(torch, flax, 'flatten', True, channels, pixels)


def norm(torch: str, flax: str | None) -> Layer:
    return Layer(torch, flax, 'norm', bias=True)


def cnn(
    convs: tuple[int, ...], channels: int | None, denses: tuple[int, ...], bn: bool = False
) -> list[Layer]:
    """Plain networks: the torch names are indices in one nn.Sequential. bn: BatchNorm comes next to
    every layer but the last."""
    first, *others = denses
    layers = [
        *(conv(f'{i}', f'conv{n}', bias=True) for n, i in enumerate(convs, 1)),
        flat_dense(f'{first}', 'dense1', channels),
        *(dense(f'{i}', f'dense{n}') for n, i in enumerate(others, 2)),
    ]
    if not bn:
        return layers
    *hidden, last = layers
    norms = [norm(f'{int(layer.torch) + 1}', f'bn{n}') for n, layer in enumerate(hidden, 1)]
    return [*chain.from_iterable(zip(hidden, norms, strict=True)), last]


def vgg(plan: tuple[int | str, ...], bn: bool) -> list[Layer]:
    """VGG: `features` counts every module, the ReLUs and poolings too."""
    layers, index, n = [], 0, 0
    for width in plan:
        if width == 'M':
            index += 1
            continue
        n += 1
        layers.append(conv(f'features.{index}', f'conv{n}'))
        if bn:
            layers.append(norm(f'features.{index + 1}', f'bn{n}'))
        index += 3 if bn else 2
    last_width = [width for width in plan if width != 'M'][-1]
    return [
        *layers,
        flat_dense('classifier.0', 'dense1', last_width, pixels=4),
        dense('classifier.2', 'dense2'),
        dense('classifier.4', 'dense3'),
    ]


def wrn(depth: int, widen: int) -> list[Layer]:
    """Wide ResNets. torch also registers `sub_block1`, a twin of block1 that is never used."""
    layers = [conv('conv1', 'conv1')]
    for group in ('block1', 'sub_block1', 'block2', 'block3'):
        for i in range((depth - 4) // 6):
            for name, make in (('bn1', norm), ('conv1', conv), ('bn2', norm), ('conv2', conv)):
                flax = None if group == 'sub_block1' else f'{group}_layer{i}/{name}'
                layers.append(make(f'{group}.layer.{i}.{name}', flax))
            if i == 0 and (widen > 1 or group in ('block2', 'block3')):
                flax = None if group == 'sub_block1' else f'{group}_layer0/conv_shortcut'
                layers.append(conv(f'{group}.layer.0.convShortcut', flax))
    return [*layers, norm('bn1', 'bn1'), dense('fc', 'fc')]


def resnet(blocks: tuple[int, ...], bottleneck: bool, shortcut: str, last: str) -> list[Layer]:
    """ResNets: shortcut and last are torch's names of the projection and of the dense layer."""
    layers = [conv('conv1', 'conv1'), norm('bn1', 'bn1')]
    for group, count in enumerate(blocks, 1):
        for i in range(count):
            torch, flax = f'layer{group}.{i}', f'layer{group}_block{i}'
            for n in range(1, 4 if bottleneck else 3):
                layers.append(conv(f'{torch}.conv{n}', f'{flax}/conv{n}'))
                layers.append(norm(f'{torch}.bn{n}', f'{flax}/bn{n}'))
            if i == 0 and (bottleneck or group > 1):
                layers.append(conv(f'{torch}.{shortcut}.0', f'{flax}/shortcut_conv'))
                layers.append(norm(f'{torch}.{shortcut}.1', f'{flax}/shortcut_bn'))
    return [*layers, dense(last, 'fc')]


def plain_resnet(blocks: tuple[int, ...]) -> list[Layer]:
    """cifar_model_resnet: one nn.Sequential, four modules a block, two of them with layers `Ws`."""
    layers, index = [conv('0', 'conv1', bias=True)], 2
    for group, count in enumerate(blocks, 1):
        for i in range(count):
            flax = f'block{group}_layer{i}'
            layers += [
                conv(f'{index}.Ws.0', f'{flax}/conv1', bias=True),
                conv(f'{index + 2}.Ws.0', f'{flax}/conv_shortcut', bias=True),
                conv(f'{index + 2}.Ws.2', f'{flax}/conv2', bias=True),
            ]
            index += 4
    return [*layers, flat_dense(f'{index + 1}', 'dense1', 640), dense(f'{index + 3}', 'dense2')]


TABLES: dict[str, list[Layer]] = {
    'mnist_model': cnn((0, 2), 32, (5, 7)),
    'mnist_model_large': cnn((0, 2, 4, 6), 64, (9, 11, 13)),
    'cifar_model': cnn((0, 2), 32, (5, 7)),
    'cifar_model_large': cnn((0, 2, 4, 6), 64, (9, 11, 13)),
    'vgg4_without_maxpool': cnn((0, 2, 4, 6), 128, (9, 11, 13)),
    'cnn5': cnn((0, 2, 4), 128, (7, 9)),
    'cnn5_bn': cnn((0, 3, 6), 128, (10, 13), bn=True),
    'cnn7': cnn((0, 2, 4, 6, 8), 128, (11, 13)),
    'cnn7_bn': cnn((0, 3, 6, 9, 12), 128, (16, 19), bn=True),
    **{f'vgg{depth}': vgg(plan, bn=False) for depth, plan in PLANS.items()},
    **{f'vgg{depth}_bn': vgg(plan, bn=True) for depth, plan in PLANS.items()},
    'wrn_28_10': wrn(28, 10),
    'wrn_28_4': wrn(28, 4),
    'wrn_28_1': wrn(28, 1),
    'wrn_34_10': wrn(34, 10),
    'wrn_40_2': wrn(40, 2),
    **{f'resnet{depth}': resnet(*plan, 'shortcut', 'linear') for depth, plan in DEPTHS.items()},
    'ResNet18': resnet(*DEPTHS[18], 'downsample', 'fc'),
    'ResNet34': resnet(*DEPTHS[34], 'downsample', 'fc'),
    'ResNet50': resnet(*DEPTHS[50], 'downsample', 'fc'),
    'cifar_model_resnet': plain_resnet((6, 5, 5)),
    'lin_1': cnn((), None, (1,)),
    'lin_2': cnn((), None, (1, 2)),
    'lin_3': cnn((), None, (1, 2, 3)),
    'lin_4': cnn((), None, (1, 2, 3)),
}


def table(arch: str | Sequence[Layer]) -> Sequence[Layer]:
    """Returns the table of an architecture, or `arch` itself where it is a table.

    Raises ValueError, with the nearest name, for one that has none.
    """
    if not isinstance(arch, str):
        return arch
    return lookup(TABLES, arch, 'architecture with torch names')


def leaves(arch: str | Sequence[Layer], scores: bool = False) -> list[Leaf]:
    """Returns the tensors of `arch` in state-dict order; with each kernel's scores if asked for."""
    result = []
    for layer in table(arch):
        if layer.kind == 'norm':
            result += [
                _leaf(layer, 'weight', 'params', 'scale'),
                _leaf(layer, 'bias', 'params', 'bias'),
                _leaf(layer, 'running_mean', 'batch_stats', 'mean'),
                _leaf(layer, 'running_var', 'batch_stats', 'var'),
                Leaf(f'{layer.torch}.num_batches_tracked', None, None),
            ]
            continue
        result.append(_leaf(layer, 'weight', 'params', 'kernel'))
        if layer.bias:
            result.append(_leaf(layer, 'bias', 'params', 'bias'))
        if scores:
            result.append(_leaf(layer, 'popup_scores', 'scores', 'kernel'))
    return result


def generic_leaves(params: dict, batch_stats: dict, scores: bool = False) -> list[Leaf]:
    """Returns the tensors of any Flax network under their own paths, such as 'conv1/kernel'.

    params, batch_stats: {path joined with '/': array}. A kernel's scores are 'conv1/popup_scores'.
    Kernels are put in torch's layout; a dense layer behind a flattened map keeps the order of its
    inputs, H*W*C.
    """
    result = []
    for path, array in params.items():
        layer, _, leaf = path.rpartition('/')
        kernel = Layer(layer, layer, 'dense') if leaf == 'kernel' and array.ndim > 1 else None
        result.append(Leaf(path, 'params', path, kernel))
        if kernel and scores:
            name = f'{layer}/popup_scores'.lstrip('/')
            result.append(Leaf(name, 'scores', path, kernel))
    return result + [Leaf(path, 'batch_stats', path) for path in batch_stats]


def path_leaves(state_dict: Mapping[str, np.ndarray]) -> list[Leaf]:
    """Returns the tensors of a file that has them under `generic_leaves`' names."""
    result = []
    for name, array in state_dict.items():
        layer, _, leaf = name.rpartition('/')
        kernel = Layer(layer, layer, 'dense')
        if leaf == 'popup_scores':
            result.append(Leaf(name, 'scores', f'{layer}/kernel'.lstrip('/'), kernel))
        elif leaf in ('mean', 'var'):  # Flax's BatchNorm is what has them
            result.append(Leaf(name, 'batch_stats', name))
        else:
            is_kernel = leaf == 'kernel' and array.ndim > 1
            result.append(Leaf(name, 'params', name, kernel if is_kernel else None))
    return result


def draft(state_dict: Mapping[str, np.ndarray]) -> list[Layer]:
    """Returns a name table for the tensors of an unknown network, to be corrected by hand: what
    each layer is by its shape, with torch's name for its Flax path."""
    table, channels = [], None
    for name, weight in state_dict.items():
        layer, _, leaf = name.rpartition('.')
        if leaf != 'weight' or weight.ndim not in (1, 2, 4):
            continue
        flax, bias = layer.replace('.', '_'), f'{layer}.bias' in state_dict
        if weight.ndim == 2 and channels:  # the first dense layer behind the convolutions
            table.append(Layer(layer, flax, 'flatten', bias, channels))
        else:
            kind = {1: 'norm', 2: 'dense', 4: 'conv'}[weight.ndim]
            table.append(Layer(layer, flax, kind, bias))
        channels = {2: None, 4: len(weight)}.get(weight.ndim, channels)
    return table


def read_table(path: str | os.PathLike) -> list[Layer]:
    """Returns a name table from a JSON file: rows [torch, flax, kind, bias, channels, pixels].

    The fields are those of Layer, the last three optional.
    Raises ValueError where the file is no such list.
    """
    try:
        table = [Layer(*row) for row in json.loads(Path(path).read_text())]
        if unknown := {layer.kind for layer in table} - set(KINDS):
            raise ValueError(f'a layer is conv, dense, flatten or norm, not {unknown.pop()!r}')
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no name table: {error}') from None
    return table


def _leaf(layer, torch_leaf, collection, flax_leaf):
    name, kernel = f'{layer.torch}.{torch_leaf}', layer if flax_leaf == 'kernel' else None
    if layer.flax is None:
        return Leaf(name, None, None, kernel)
    return Leaf(name, collection, f'{layer.flax}/{flax_leaf}', kernel)
