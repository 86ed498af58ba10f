"""How much a network takes: bytes, multiply-adds, units, dense and without what has no effect."""

from collections.abc import Mapping

import numpy as np

from .evaluate import shapes
from .graph import LAYERS, Graph
from .sparse import packed


def bytes_of(state_dict: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns {'dense_bytes', 'sparse_bytes'}: of all tensors as they are, and of a sparse file's
    (conversion.sparse)."""
    small, _ = packed(dict(state_dict))
    return {
        'dense_bytes': sum(array.nbytes for array in state_dict.values()),
        'sparse_bytes': sum(array.nbytes for array in small.values()),
    }


def costs(dense: Graph, smaller: Graph) -> dict:
    """Returns what an image costs in a network's graph and in the smaller one of `compact`:

    macs and compact_macs: multiply-adds with every weight of the convolutions and dense layers;
    sparse_macs: with those of the smaller graph that are not 0, as C makes them; compact_bytes: of
    the smaller graph's weights, biases and constants; units: {layer: [left, all]}, the output
    channels of each layer.
    """
    every = {name: node for name, node in dense.nodes.items() if node.op in LAYERS}
    left = {name: len(_kernel(smaller, name)) for name in every if name in smaller.nodes}
    return {
        'macs': _multiply_adds(dense, np.size),
        'compact_macs': _multiply_adds(smaller, np.size),
        'sparse_macs': _multiply_adds(smaller, np.count_nonzero),
        'compact_bytes': sum(array.nbytes for array in smaller.initialisers.values()),
        'units': {
            node.inputs[1].rpartition('/')[0]: [left.get(name, 0), len(_kernel(dense, name))]
            for name, node in every.items()
        },
    }


def _kernel(graph, name):
    return graph.initialisers[graph.nodes[name].inputs[1]]


def _multiply_adds(graph, count):
    sizes = shapes(graph)
    layers = [name for name, node in graph.nodes.items() if node.op in LAYERS]
    return int(sum(count(_kernel(graph, x)) * np.prod(sizes[x][2:], dtype=int) for x in layers))
