"""A network's graph as a Python file that defines it in ordinary PyTorch layers."""

from collections.abc import Callable

import numpy as np

from .graph import LAYERS, Graph

_FILE = '''\
"""A pruned network without what has no effect, by robustprune_jax: images
[batch, {shape}] in [0, 1] -> logits."""

import torch
from torch import nn
from torch.nn import functional


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
{layers}

    def forward(self, images):
{steps}
        return logits
'''


def torch_module(graph: Graph, name: str = 'Network') -> tuple[str, dict[str, np.ndarray]]:
    """Returns (the text of a Python file with the torch.nn.Module `name`, its state dict).

    The module takes float32 images [batch, C, H, W] in [0, 1] and returns logits [batch, K]; the
    file needs only torch. Raises NotImplementedError, naming it, on an operation without torch.
    """
    state_dict, layers, steps, names = {}, [], [], {'images': 'images'}

    def written(x):
        if x not in names:
            array, constant = graph.initialisers[x], f'constant{len(layers)}'
            if array.dtype.kind in 'iu':  # a shape
                return array.tolist()
            names[x], state_dict[constant] = f'self.{constant}', array
            layers.append(f"self.register_buffer('{constant}', torch.empty({list(array.shape)}))")
        return names[x]

    for i, (value, node) in enumerate(graph.nodes.items()):
        if node.op in LAYERS and all(x in graph.initialisers for x in node.inputs[1:]):
            layer, text = f'{node.op.lower()}{i}', written(node.inputs[0])
            arrays = [graph.initialisers[x] for x in node.inputs[1:]]
            state_dict |= dict(zip((f'{layer}.weight', f'{layer}.bias'), arrays, strict=False))
            if node.op == 'Conv':
                text = _padded(node, text, 0.0)
            layers.append(f'self.{layer} = {LAYER[node.op](node, arrays)}')
            text = f'self.{layer}({text})'
        elif node.op in OPERATIONS:
            text = OPERATIONS[node.op](node, *map(written, node.inputs))
        else:
            known = ', '.join(sorted([*OPERATIONS, *LAYERS]))
            raise NotImplementedError(f'no torch for the operation {node.op!r}; there is: {known}')
        names[value] = 'logits' if value == 'logits' else f'x{i}'
        steps.append(f'{names[value]} = {text}')
    text = _FILE.format(
        shape=', '.join(map(str, graph.image_shape)),
        name=name,
        layers='\n'.join(f'        {line}' for line in layers),
        steps='\n'.join(f'        {line}' for line in steps),
    )
    return text, state_dict


def _conv(node, arrays):
    kernel, a = arrays[0], node.attributes
    return (
        f'nn.Conv2d({kernel.shape[1] * a["group"]}, {len(kernel)}, {tuple(kernel.shape[2:])}, '
        f'stride={tuple(a["strides"])}, dilation={tuple(a["dilations"])}, groups={a["group"]}, '
        f'bias={len(arrays) > 1})'
    )


def _linear(node, arrays):
    return f'nn.Linear({arrays[0].shape[1]}, {len(arrays[0])}, bias={len(arrays) > 1})'


LAYER = {'Conv': _conv, 'Gemm': _linear}


def _padded(node, x, value):
    """torch's own padding is the same on both sides."""
    top, left, bottom, right = node.attributes['pads']
    if not any(node.attributes['pads']):
        return x
    return f'functional.pad({x}, {(left, right, top, bottom)}, value={value!r})'


def _max_pool(node, x):
    x = _padded(node, x, float('-inf')).replace('=-inf', "=float('-inf')")
    a = node.attributes
    return f'functional.max_pool2d({x}, {tuple(a["kernel_shape"])}, {tuple(a["strides"])})'


def _average_pool(node, x):
    a, x = node.attributes, _padded(node, x, 0.0)
    return f'functional.avg_pool2d({x}, {tuple(a["kernel_shape"])}, {tuple(a["strides"])})'


def _written(text: str) -> Callable[..., str]:
    return lambda node, *inputs: text.format(*inputs, **node.attributes)


# operation -> (node, its inputs as written) -> its value as written
OPERATIONS: dict[str, Callable[..., str]] = {
    'Abs': _written('torch.abs({0})'),
    'Add': _written('{0} + {1}'),
    'AveragePool': _average_pool,
    'Concat': lambda node, *x: f'torch.cat(({", ".join(x)}), {node.attributes["axis"]})',
    'Div': _written('{0} / {1}'),
    'Equal': _written('{0} == {1}'),
    'Erf': _written('torch.erf({0})'),
    'Exp': _written('torch.exp({0})'),
    'Expand': _written('{0}.expand(torch.broadcast_shapes({0}.shape, {1}))'),
    'Flatten': _written('torch.flatten({0}, 1)'),
    'Greater': _written('{0} > {1}'),
    'GreaterOrEqual': _written('{0} >= {1}'),
    'LeakyRelu': _written('functional.leaky_relu({0}, {alpha})'),
    'Less': _written('{0} < {1}'),
    'LessOrEqual': _written('{0} <= {1}'),
    'Log': _written('torch.log({0})'),
    'MatMul': _written('{0} @ {1}'),
    'Max': _written('torch.maximum({0}, {1})'),
    'MaxPool': _max_pool,
    'Min': _written('torch.minimum({0}, {1})'),
    'Mul': _written('{0} * {1}'),
    'Neg': _written('-{0}'),
    'Not': _written('~{0}'),
    'Pow': _written('{0} ** {1}'),
    'Reciprocal': _written('1 / {0}'),
    'ReduceMax': lambda node, x: f'{x}.amax({tuple(node.attributes["axes"])})',
    'ReduceMean': lambda node, x: f'{x}.mean({tuple(node.attributes["axes"])})',
    'Relu': _written('torch.relu({0})'),
    'Reshape': _written('{0}.reshape({1})'),
    'Sigmoid': _written('torch.sigmoid({0})'),
    'Sign': _written('torch.sign({0})'),
    'Sqrt': _written('torch.sqrt({0})'),
    'Sub': _written('{0} - {1}'),
    'Tanh': _written('torch.tanh({0})'),
    'Transpose': lambda node, x: f'{x}.permute({tuple(node.attributes["perm"])})',
    'Where': _written('torch.where({0}, {1}, {2})'),
}
