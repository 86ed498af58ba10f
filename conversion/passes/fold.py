"""BatchNorm, and any other factor and shift per channel, in the layer before it."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from conversion.evaluate import shapes
from conversion.graph import LAYERS, Graph


class _Affine(NamedTuple):
    """source * scale + shift; float64 [channels], of constants of a type."""

    source: str
    scale: np.ndarray
    shift: np.ndarray
    dtype: np.dtype


def fold(graph: Graph) -> Graph:
    """Returns the graph with each run of factors and shifts per channel as one, which a
    convolution or dense layer before it takes into its kernel and bias.

    Constants are computed in float64.
    """
    folded = Graph(graph.image_shape, initialisers=dict(graph.initialisers))
    uses = Counter(name for node in graph.nodes.values() for name in node.inputs)
    sizes, affine = shapes(graph), {}
    for name, node in graph.nodes.items():
        found = _affine(graph, node, sizes)
        if found is None:
            folded.put(name, node.op, node.inputs, **node.attributes)
            continue
        source, scale, shift, dtype = found
        if uses[source] == 1 and source in affine:
            inner = affine[source]
            found = _Affine(inner.source, inner.scale * scale, inner.shift * scale + shift, dtype)
        affine[name] = found
        _put(folded, name, found, uses, sizes)
    folded.finish('logits', 'logits')
    return folded


def _put(graph, name, affine, uses, sizes):
    source, scale, shift, dtype = affine
    layer = graph.nodes.get(source)
    if layer and layer.op in LAYERS and uses[source] == 1:
        x, kernel, *bias = layer.inputs
        weights = graph.initialisers[kernel].astype(np.float64)
        constants = graph.initialisers[bias[0]].astype(np.float64) if bias else 0.0
        weights = weights * scale.reshape(-1, *[1] * (weights.ndim - 1))
        inputs = (
            x,
            graph.constant(weights.astype(dtype), kernel),
            graph.constant((constants * scale + shift).astype(dtype), f'{name}.bias'),
        )
        graph.put(name, layer.op, inputs, **layer.attributes)
        return
    shape = [1, -1, *[1] * (len(sizes[name]) - 2)]
    factor = graph.constant(scale.reshape(shape).astype(dtype), f'{name}.scale')
    scaled = graph.put(f'{name}.scaled', 'Mul', (source, factor))
    summand = graph.constant(shift.reshape(shape).astype(dtype), f'{name}.shift')
    graph.put(name, 'Add', (scaled, summand))


def _affine(graph, node, sizes):
    """What a node does to each channel; None where it is more than a factor and a shift."""
    if node.op not in ('Add', 'Sub', 'Mul', 'Div') or len(node.inputs) != 2:
        return None
    constants = [graph.initialisers.get(name) for name in node.inputs]
    if (constants[0] is None) == (constants[1] is None):
        return None
    first = constants[0] is not None
    constant, source = constants[not first], node.inputs[first]
    shape = sizes[source]
    channels = shape[1]
    full = (1,) * (len(shape) - constant.ndim) + constant.shape
    if len(full) != len(shape) or full[1] not in (1, channels):
        return None
    if any(size != 1 for axis, size in enumerate(full) if axis != 1):
        return None
    c = np.broadcast_to(constant.astype(np.float64).ravel(), (channels,))
    one, zero, dtype = np.ones(channels), np.zeros(channels), constant.dtype
    if node.op == 'Mul':
        return _Affine(source, c, zero, dtype)
    if node.op == 'Add':
        return _Affine(source, one, c, dtype)
    if node.op == 'Sub':
        return _Affine(source, -one, c, dtype) if first else _Affine(source, one, -c, dtype)
    return None if first else _Affine(source, 1 / c, zero, dtype)
