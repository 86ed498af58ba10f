"""Pooling, and what puts entries elsewhere, in C."""

from collections.abc import Callable

from conversion.graph import Node

from .plan import Map
from .writer import Writer, literal


def _pool(writer, root, node):
    _windows(writer, root, node, node.attributes['kernel_shape'])


def _reduce(writer, root, node):
    """The whole map is one window."""
    if tuple(node.attributes['axes']) != (2, 3):
        raise NotImplementedError(f'no C for {node.op} over axes {node.attributes["axes"]}')
    inputs = writer.maps[node.inputs[0]]
    _windows(writer, root, node, (inputs.height, inputs.width))


def _windows(writer, root, node, sizes):
    shape, source = writer.maps[root], node.inputs[0]
    inputs, (ky, kx) = writer.maps[source], sizes
    sy, sx = node.attributes.get('strides', (1, 1))
    top, left = node.attributes.get('pads', (0, 0))[:2]
    largest = node.op in ('MaxPool', 'ReduceMax')
    start, step = ('-INFINITY', 'm = fmaxf(m, v)') if largest else ('0', 'm += v')
    result = 'm' if largest else f'm * {literal(1 / (ky * kx))}'
    writer.body.append(
        f'  for (int c = 0; c < {shape.channels}; c++)\n'
        f'    for (int y = 0; y < {shape.height}; y++)\n'
        f'      for (int x = 0; x < {shape.width}; x++) {{\n'
        f'        float m = {start};\n'
        f'        for (int b = y * {sy} - {top}; b < y * {sy} - {top} + {ky}; b++)\n'
        f'          for (int a = x * {sx} - {left}; a < x * {sx} - {left} + {kx}; a++) {{\n'
        f'            int inside = b >= 0 && b < {inputs.height} && a >= 0 && '
        f'a < {inputs.width};\n            if (!inside) continue;\n'
        f'            float v = {writer.entry(source, y="b", x="a")};\n'
        f'            {step};\n          }}\n'
        f'        {writer.entry(root)} = {result};\n      }}'
    )


def _reshape(writer, root, node):
    """Entries in their order: place p of the one is place p of the other."""
    inputs, shape = writer.maps[node.inputs[0]], writer.maps[root]
    if shape[1:3] == (1, 1):  # a flattened map
        target = writer.entry(root, c=_flat(inputs))
        writer.loop(inputs, target, writer.entry(node.inputs[0]))
        return
    place, area = f'({_flat(shape)})', inputs.height * inputs.width
    source = (
        f'{place} / {area}',
        f'{place} / {inputs.width} % {inputs.height}',
        f'{place} % {inputs.width}',
    )
    writer.loop(shape, writer.entry(root), writer.entry(node.inputs[0], *source))


def _flat(shape: Map) -> str:
    return f'(c * {shape.height} + y) * {shape.width} + x'


def _transpose(writer, root, node):
    order = node.attributes['perm']
    if order[0] != 0:
        raise NotImplementedError(f'no C for a Transpose {order}, which moves the batch')
    axes = ['c', 'y', 'x'][: len(order) - 1]
    source = [axes[list(order).index(axis) - 1] for axis in range(1, len(order))]
    source = dict(zip(('c', 'y', 'x'), source, strict=False))
    writer.loop(writer.maps[root], writer.entry(root), writer.entry(node.inputs[0], **source))


def _expand(writer, root, node):
    writer.loop(writer.maps[root], writer.entry(root), writer.entry(node.inputs[0]))


def _concat(writer, root, node):
    if node.attributes['axis'] != 1:
        raise NotImplementedError('no C for Concat but of channels')
    start = 0
    for source in node.inputs:
        inputs = writer.maps[source]
        target = writer.entry(root, c=f'(c + {start})')
        writer.loop(inputs, target, writer.entry(source))
        start += inputs.channels


# operation -> (writer, root, node), which adds its loops
MOVES: dict[str, Callable[[Writer, str, Node], None]] = {
    'AveragePool': _pool,
    'Concat': _concat,
    'Expand': _expand,
    'Flatten': _reshape,
    'MaxPool': _pool,
    'ReduceMax': _reduce,
    'ReduceMean': _reduce,
    'Reshape': _reshape,
    'Transpose': _transpose,
}
