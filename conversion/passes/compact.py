"""Exact removal of what has no effect, or always the same one."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from conversion.evaluate import OPERATIONS, shapes
from conversion.graph import LAYERS, Graph, Node

# Do the same with each channel.
UNARY = {
    'Abs', 'AveragePool', 'Erf', 'Exp', 'LeakyRelu', 'Log', 'MaxPool', 'Neg', 'Not', 'ReduceMax',
    'ReduceMean', 'Reciprocal', 'Relu', 'Sigmoid', 'Sign', 'Sqrt', 'Tanh',
}  # fmt: skip
ENTRYWISE = {
    'Add', 'Div', 'Equal', 'Greater', 'GreaterOrEqual', 'Less', 'LessOrEqual', 'Max', 'Min', 'Mul',
    'Pow', 'Sub', 'Where',
}  # fmt: skip
_POOLS = ('AveragePool', 'MaxPool', 'ReduceMax', 'ReduceMean')


def compact(graph: Graph) -> Graph:
    """Returns a smaller graph with the same logits, but for rounding, at any size of image.

    What goes are channels that no path of weights leads from to the logits, and those that are
    constant, which what reads them takes into its bias. Where a padded convolution reads several
    constant channels, one of them stands for all, so that borders stay exact. Channels that are
    added, concatenated or gated go when they may go everywhere. A layer keeps one channel at least.
    """
    with jax.enable_x64(True):
        return _Compaction(graph).smaller()


def opaque(graph: Graph) -> list[str]:
    """Returns the operations whose inputs `compact` leaves whole, for it does not know them."""
    found = _Compaction(graph)
    return sorted({node.op for name, node in graph.nodes.items() if not found.known[name]})


class _Layer(NamedTuple):
    """A convolution or dense layer: float64 kernel [outputs, inputs, ...] and bias [outputs]."""

    kernel: np.ndarray
    bias: np.ndarray


class _Compaction:
    """What is known of each channel of each value; `places`: which entries are those of a value."""

    def __init__(self, graph: Graph):
        self.graph, self.shapes = graph, shapes(graph)
        self.places, count = {}, 0
        for name in ('images', *graph.nodes):
            channels = self.shapes[name][1] if len(self.shapes[name]) > 1 else 0
            self.places[name] = np.arange(count, count + channels)
            count += channels
        self.known = {name: self._knows(name, node) for name, node in graph.nodes.items()}
        pairs = [pair for name in graph.nodes for pair in self._together(name)]
        one, other = np.concatenate([np.empty((2, 0), int), *pairs], axis=1)
        together = coo_array((np.ones(len(one)), (one, other)), (count, count))
        self.of_class = connected_components(together, directed=False)[1]
        self.constants = np.full(count, np.nan)  # of a channel; NaN: it depends on the image
        self.layers: dict[str, _Layer] = {}

    def smaller(self) -> Graph:
        for name, node in self.graph.nodes.items():
            self._fold_constants(name, node)
        needed = self._needed()
        return self._sliced(needed[self.of_class], self._kept(needed)[self.of_class])

    def _values(self, node: Node) -> list[str]:
        return [name for name in node.inputs if name not in self.graph.initialisers]

    def _depthwise(self, node: Node) -> bool:
        return node.op == 'Conv' and node.attributes['group'] > 1

    def _knows(self, name, node):
        """Whether what it does to each channel is known."""
        sizes, values = self.shapes, self._values(node)
        if node.op in LAYERS:
            layers = all(x in self.graph.initialisers for x in node.inputs[1:])
            return layers and node.attributes.get('group', 1) in (1, sizes[node.inputs[0]][1])
        if node.op == 'Flatten':
            return node.attributes['axis'] == 1
        if node.op == 'Concat':
            return node.attributes['axis'] == 1 and len(values) == len(node.inputs)
        if node.op in _POOLS and 'axes' in node.attributes:
            return min(node.attributes['axes']) > 1
        if node.op in UNARY:
            return True
        rank, channels = len(sizes[name]), sizes[name][1:2]
        constants = [self.graph.initialisers[x].shape for x in node.inputs if x not in values]
        return (
            node.op in ENTRYWISE
            and all((len(sizes[x]), sizes[x][1:2]) == (rank, channels) for x in values)
            and all(len(shape) in (0, rank) for shape in constants)
        )

    def _together(self, name) -> Iterator[np.ndarray]:
        """Pairs of channels that go only together."""
        node, outputs = self.graph.nodes[name], self.places[name]
        if not self.known[name] or (node.op in LAYERS and not self._depthwise(node)):
            return
        values = [self.places[x] for x in self._values(node)]
        if node.op == 'Concat':
            values = [np.concatenate(values)]
        for inputs in values:
            if len(inputs):
                yield np.stack([np.repeat(inputs, len(outputs) // len(inputs)), outputs])

    def _fold_constants(self, name, node):
        """Finds which channels are constant, and folds constant inputs into a layer's bias."""
        if not self.known[name]:
            return
        outputs = self.places[name]
        inputs = [self.constants[self.places[x]] for x in self._values(node)]
        if node.op in LAYERS:
            self.constants[outputs] = self._layer(name, node, inputs[0])
        elif node.op == 'Concat':
            self.constants[outputs] = np.concatenate(inputs)
        elif node.op == 'Flatten':
            self.constants[outputs] = np.repeat(inputs[0], len(outputs) // len(inputs[0]))
        elif node.op in _POOLS:
            borders = node.op == 'AveragePool' and any(node.attributes['pads'])
            varies = borders & (inputs[0] != 0)
            self.constants[outputs] = np.where(varies, np.nan, inputs[0])
        else:
            self.constants[outputs] = self._entrywise(node, len(outputs))

    def _entrywise(self, node, channels):
        """Constant where all inputs are."""
        columns = []
        for x in node.inputs:
            array = self.graph.initialisers.get(x)
            if array is None:
                array = self.constants[self.places[x]]
            elif array.size in (1, channels) and array.size == max(array.shape[1:2], default=1):
                array = array.ravel().astype(np.float64)
            else:  # differs over the map
                array = np.full(channels, np.nan)
            columns.append(np.broadcast_to(array, (channels,)))
        varies = np.isnan(columns).any(axis=0)
        values = OPERATIONS[node.op](node, *[np.nan_to_num(column) for column in columns])
        return np.where(varies, np.nan, np.asarray(values, np.float64))

    def _layer(self, name, node, inputs):
        """The layer without constant inputs; returns which of its outputs are constant."""
        kernel, *bias = [self.graph.initialisers[x].astype(np.float64) for x in node.inputs[1:]]
        bias = bias[0] if bias else np.zeros(len(kernel))
        if self._depthwise(node):
            self.layers[name] = _Layer(kernel, bias)
            reads = kernel.any(axis=tuple(range(1, kernel.ndim)))
            reads &= np.repeat(inputs, len(kernel) // len(inputs)) != 0
            return np.where(reads, np.nan, bias)
        kernel = kernel.copy()
        constant = np.flatnonzero(inputs == 0)
        kernel[:, constant] = 0
        constant = np.flatnonzero(~np.isnan(inputs) & (inputs != 0))
        if len(constant) and not any(node.attributes.get('pads', ())):
            sums = kernel[:, constant].sum(axis=tuple(range(2, kernel.ndim)))
            bias = bias + sums @ inputs[constant]
            kernel[:, constant] = 0
        elif len(constant):  # one stands for all
            stands = constant[0]
            parts = inputs[constant] / inputs[stands]
            kernel[:, stands] = np.tensordot(parts, kernel[:, constant], axes=(0, 1))
            kernel[:, constant[1:]] = 0
        self.layers[name] = _Layer(kernel, bias)
        reads = kernel.any(axis=tuple(range(1, kernel.ndim)))
        return np.where(reads, np.nan, bias)

    def _needed(self) -> np.ndarray:
        """The classes of channels on which the logits depend."""
        needed = np.zeros(self.of_class.max() + 1, bool)
        for name in ('images', 'logits'):
            needed[self.of_class[self.places[name]]] = True
        for name, node in self.graph.nodes.items():
            if not self.known[name]:
                for x in (name, *self._values(node)):
                    needed[self.of_class[self.places[x]]] = True
        while True:
            before = needed.copy()
            for name in reversed(self.layers):
                node = self.graph.nodes[name]
                if self._depthwise(node):
                    continue
                outputs = needed[self.of_class[self.places[name]]]
                classes = self.of_class[self.places[node.inputs[0]]]
                kernel = self.layers[name].kernel[outputs]
                read = kernel.any(axis=(0, *range(2, kernel.ndim)))
                needed[classes[read]] = True
            if (needed == before).all():
                return needed

    def _kept(self, needed: np.ndarray) -> np.ndarray:
        """The classes that stay: also one input of each layer that stays."""
        kept, before = needed.copy(), None
        while before is None or (kept != before).any():
            before = kept.copy()
            for name in self.layers:
                classes = self.of_class[self.places[self.graph.nodes[name].inputs[0]]]
                if kept[self.of_class[self.places[name]]].any() and not kept[classes].any():
                    kept[classes[0]] = True
        return kept

    def _sliced(self, needed: np.ndarray, kept: np.ndarray) -> Graph:
        """The graph of the channels that are kept, 0 where they are not needed."""
        graph = Graph(self.graph.image_shape, initialisers=dict(self.graph.initialisers))
        for name, node in self.graph.nodes.items():
            outputs = kept[self.places[name]]
            inputs, attributes = list(node.inputs), dict(node.attributes)
            if name in self.layers:
                read = kept[self.places[node.inputs[0]]]
                kernel, bias = self.layers[name]
                used = needed[self.places[name]].reshape(-1, *[1] * (kernel.ndim - 1))
                kernel = np.where(used, kernel, 0)
                kernel = kernel[outputs] if self._depthwise(node) else kernel[outputs][:, read]
                if self._depthwise(node):
                    attributes['group'] = int(read.sum())
                inputs = [inputs[0], self._constant(graph, node.inputs[1], kernel)]
                if len(node.inputs) > 2 or bias.any():
                    bias_name = node.inputs[2] if len(node.inputs) > 2 else f'{name}.bias'
                    dtype = graph.initialisers[node.inputs[1]].dtype
                    inputs.append(graph.constant(bias[outputs].astype(dtype), bias_name))
            elif node.op == 'Concat' and self.known[name]:
                inputs = [x for x in inputs if kept[self.places[x]].any()]
            elif node.op in ENTRYWISE and self.known[name]:
                inputs = [self._slice(graph, x, outputs) for x in inputs]
            graph.put(name, node.op, inputs, **attributes)
        graph.finish('logits', 'logits')
        return graph

    def _constant(self, graph, name, array):
        return graph.constant(array.astype(self.graph.initialisers[name].dtype), name)

    def _slice(self, graph, name, kept):
        array = self.graph.initialisers.get(name)
        if array is None or array.ndim < 2 or array.shape[1] != len(kept) or array.shape[1] == 1:
            return name
        return graph.constant(array[:, kept], name)
