"""Convolutions and dense layers in C: sums over the nonzero weights.

A convolution runs over each map as one row: an output at p is the sum of weight * input[at + p],
whatever row p is in, with the sums in registers. What this computes between rows is never read.
Maps lie padded in the workspace, so nothing is copied for it; of strides the input is parted into
planes of equal phase first.
"""

import math

import numpy as np

from .writer import LANES, Writer

_MOST = 12  # vectors of sums, of 16 registers


def convolution(writer: Writer, root: str, layer: str, text: str) -> None:
    """Adds a layer's loop; text: C for the entry of `root` from `sum`, its output there."""
    node = writer.graph.nodes[layer]
    kernel, bias = _weights(writer, node)
    shape, strides = writer.maps[root], node.attributes['strides']
    pointer, row, place = (_parted if max(strides) > 1 else _padded)(writer, node, shape)
    o, i, y, x = np.nonzero(kernel)
    per_group = len(kernel) // node.attributes['group']
    first = writer.array('int', np.searchsorted(o, np.arange(len(kernel) + 1)))
    at = writer.array('int', place(i + o // per_group * kernel.shape[1], y, x))
    weights = writer.array('float', kernel[o, i, y, x])
    length = (shape.height - 1) * row + shape.width
    vectors = _vectors(length)
    writer.runs.add(vectors)
    writer.scratch = max(writer.scratch, -(-length // (vectors * LANES)) * vectors * LANES)
    offset = f' + {writer.array("float", bias)}[c]' if bias is not None else ''
    writer.body.append(
        f'  for (int c = 0; c < {shape.channels}; c++) {{\n'
        f'    float *sums = workspace + @SCRATCH;\n'
        f'    run{vectors}({pointer}, {at} + {first}[c], {weights} + {first}[c], '
        f'{first}[c + 1] - {first}[c], sums, {length});\n'
        f'    for (int y = 0; y < {shape.height}; y++)\n'
        f'      for (int x = 0; x < {shape.width}; x++) {{\n'
        f'        float sum = sums[y * {row} + x]{offset};\n'
        f'        {writer.entry(root)} = {text};\n'
        f'      }}\n  }}'
    )


def _padded(writer, node, shape):
    """The input where it lies, the length of its rows, and where a tap reads for the output 0."""
    source = node.inputs[0]
    inputs, (dy, dx) = writer.maps[source], node.attributes['dilations']
    top, left = node.attributes['pads'][:2]

    def place(c, y, x):
        return (
            c * inputs.plane
            + (y * dy - top + inputs.top) * inputs.row
            + (x * dx - left + inputs.left)
        )

    return writer.pointer(source), inputs.row, place


def _parted(writer, node, shape):
    """The same of the padded input as planes of equal phase, with the rows that the taps reach."""
    source = node.inputs[0]
    inputs = writer.maps[source]
    (sy, sx), (dy, dx) = node.attributes['strides'], node.attributes['dilations']
    top, left = node.attributes['pads'][:2]
    taps = writer.graph.initialisers[node.inputs[1]].shape[2:]
    height = shape.height + (taps[0] - 1) * dy // sy + 1
    row = shape.width + (taps[1] - 1) * dx // sx + 1
    plane, planes = height * row, sy * sx
    writer.phases = max(writer.phases, inputs.channels * planes * plane + 13 * LANES)
    writer.body.append(
        f'  for (int c = 0; c < {inputs.channels}; c++)\n'
        f'    for (int i = 0; i < {sy}; i++)\n'
        f'      for (int j = 0; j < {sx}; j++)\n'
        f'        for (int v = 0; v < {height}; v++)\n'
        f'          for (int u = 0; u < {row}; u++) {{\n'
        f'            int y = v * {sy} + i - {top}, x = u * {sx} + j - {left};\n'
        f'            int inside = y >= 0 && y < {inputs.height} && x >= 0 && '
        f'x < {inputs.width};\n'
        f'            workspace[@PHASES + ((c * {sy} + i) * {sx} + j) * {plane} + v * {row} + u]'
        f' =\n              inside ? {writer.entry(source)} : 0;\n          }}'
    )

    def place(c, y, x):
        phase = y * dy % sy * sx + x * dx % sx
        return (c * planes + phase) * plane + y * dy // sy * row + x * dx // sx

    return '(workspace + @PHASES)', row, place


def dense(writer: Writer, root: str, layer: str, text: str) -> None:
    """Adds a dense layer's loop, see `convolution`; with all weights, zeros too, where so many are
    left that it is faster. (Of convolutions it was no faster below 0.9 of the weights.)"""
    node = writer.graph.nodes[layer]
    kernel, bias = _weights(writer, node)
    x = writer.pointer(node.inputs[0])
    start = f'{writer.array("float", bias)}[c]' if bias is not None else '0'
    rows, columns = np.nonzero(kernel)
    if len(rows) > writer.dense_above * kernel.size:
        weights, inputs = writer.array('float', kernel), kernel.shape[1]
        total = f'    float sum = {start} + dot({weights} + c * {inputs}, {x}, {inputs});\n'
    else:
        first = writer.array('int', np.searchsorted(rows, np.arange(len(kernel) + 1)))
        at, weights = writer.array('int', columns), writer.array('float', kernel[rows, columns])
        total = (
            f'    float sum = {start};\n'
            f'    for (int k = {first}[c]; k < {first}[c + 1]; k++)\n'
            f'      sum += {weights}[k] * {x}[{at}[k]];\n'
        )
    writer.body.append(
        f'  for (int c = 0; c < {len(kernel)}; c++) {{\n{total}'
        f'    {writer.entry(root, y="0", x="0")} = {text};\n  }}'
    )


def _weights(writer, node):
    """The kernel, and the bias or None."""
    kernel, *bias = [writer.graph.initialisers[name] for name in node.inputs[1:]]
    return kernel, bias[0] if bias else None


def _vectors(length: int) -> int:
    """How many vectors of sums take the least time for a run of this length."""

    def cost(r):
        return math.ceil(length / (r * LANES)) * (r + 1.5)

    return min(range(1, _MOST + 1), key=cost)
