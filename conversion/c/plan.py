"""What a network's C file computes where: which values are written down, and where they lie."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from conversion.evaluate import shapes
from conversion.graph import LAYERS, Graph

from .formulas import FORMULAS


class Map(NamedTuple):
    """How a value lies in the workspace: channels of (height + borders) rows."""

    channels: int
    height: int = 1
    width: int = 1
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @property
    def row(self) -> int:
        return self.left + self.width + self.right

    @property
    def plane(self) -> int:
        return (self.top + self.height + self.bottom) * self.row

    def at(self, c: str | int, y: str | int, x: str | int) -> str:
        return f'{c} * {self.plane} + ({y} + {self.top}) * {self.row} + {x} + {self.left}'


class Buffer(NamedTuple):
    """A piece of the workspace, in floats."""

    offset: int
    size: int


class Plan:
    """inlined: the values that are not written down, but computed inside the expression of the one
    that reads them; roots: those that are, in order; maps and buffers: how and where they lie;
    arena: the floats of all buffers together. slack: floats that may be read beyond a value's end.
    """

    def __init__(self, graph: Graph, slack: int):
        self.graph, self.shapes = graph, shapes(graph)
        self.uses = Counter(x for node in graph.nodes.values() for x in node.inputs)
        self.order = {value: i for i, value in enumerate(graph.nodes)}
        self.inlined = {value for value in graph.nodes if self._is_inlined(value)}
        self._one_layer_each()
        self.roots = [value for value in graph.nodes if value not in self.inlined]
        if any(
            self.is_layer(value) and self._strides(value) == (1, 1) and 'images' in node.inputs
            for value, node in graph.nodes.items()
        ):
            self.roots.insert(0, 'images')
        self.maps = {value: self._map(value) for value in ('images', *graph.nodes)}
        if 'images' not in self.roots:
            self.maps['images'] = Map(*graph.image_shape)  # read where the caller has them
        self.buffers = self._buffers(slack)
        self.arena = max((b.offset + b.size for b in self.buffers.values()), default=0)

    def _is_inlined(self, value):
        """Entry by entry, or a layer, and read only by an operation entry by entry, which does
        not spread it over a map."""
        node = self.graph.nodes[value]
        if self.uses[value] != 1 or not (node.op in FORMULAS or node.op in LAYERS):
            return False
        reader, by = next((r, n) for r, n in self.graph.nodes.items() if value in n.inputs)
        return by.op in FORMULAS and self.shapes[reader] == self.shapes[value]

    def _one_layer_each(self):
        """Of several layers in one expression all but the last are computed before it."""
        for value in self.graph.nodes:
            if value not in self.inlined:
                layers = [x for x in self.leaves(value) if self.is_layer(x) and x in self.inlined]
                for earlier in sorted(layers, key=self.order.get)[:-1]:
                    self.inlined.discard(earlier)

    def leaves(self, value):
        """The values that an expression reads, and the layer inside it."""
        node = self.graph.nodes.get(value)
        if node is None or node.op not in FORMULAS:
            return [value]
        found = []
        for x in node.inputs:
            if x in self.inlined:
                found += self.leaves(x) if self.graph.nodes[x].op in FORMULAS else [x]
            elif x not in self.graph.initialisers:
                found.append(x)
        return found

    def is_layer(self, value):
        node = self.graph.nodes.get(value)
        return node is not None and node.op in LAYERS

    def _strides(self, value):
        return tuple(self.graph.nodes[value].attributes.get('strides', (1, 1)))

    def _map(self, value):
        shape = self.shapes[value]
        if len(shape) not in (2, 4):
            raise NotImplementedError(f'no C for a value of shape {shape}')
        readers = [
            node.attributes
            for node in self.graph.nodes.values()
            if node.op == 'Conv'
            and node.inputs[0] == value
            and max(node.attributes['strides']) == 1
        ]
        pads = (
            np.max([reader['pads'] for reader in readers], axis=0, initial=0)
            if readers
            else [0] * 4
        )
        return Map(*shape[1:], *map(int, pads)) if len(shape) == 4 else Map(shape[1])

    def _read(self, root):
        """The values in memory that a root needs."""
        if root == 'images':
            return []
        found = []
        for x in self.leaves(root) if self.graph.nodes[root].op in FORMULAS else [root]:
            if x == root or x in self.inlined:
                inputs = self.graph.nodes[x].inputs
                found += [y for y in inputs if y not in self.graph.initialisers]
            else:
                found.append(x)
        return found

    def _buffers(self, slack):
        """Where each root lies: the first place that is free while it is needed."""
        last = {root: i for i, root in enumerate(self.roots)}
        for i, root in enumerate(self.roots):
            for x in self._read(root):
                last[x] = i
        buffers: dict[str, Buffer] = {}
        for i, root in enumerate(self.roots):
            if root == 'logits':
                continue
            shape = self.maps[root]
            size = shape.channels * shape.plane + slack
            live = sorted(buffer for other, buffer in buffers.items() if last[other] >= i)
            offset = 0
            for buffer in live:
                if offset + size <= buffer.offset:
                    break
                offset = max(offset, buffer.offset + buffer.size)
            buffers[root] = Buffer(offset, -(-size // 16) * 16)
        return buffers
