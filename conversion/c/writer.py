"""What every part of a network's C file needs: constants, places in memory, expressions, loops."""

import numpy as np

from conversion.graph import Graph

from .formulas import FORMULAS
from .plan import Map, Plan

LANES = 8  # floats of a vector
SLACK = 13 * LANES  # floats that runs read beyond the end


class Writer:
    """Collects the file: `body` are the statements of one image; `data` the constants.

    dense_above: the fraction of nonzero weights above which a dense layer multiplies with all.
    separate: whether the constants are bytes of a file of their own, `binary`, instead of text.
    phases and scratch: floats of the workspace, after the plan's arena, that a layer needs for its
    input parted by strides, and for its sums; runs: the numbers of vectors that are summed at once.
    """

    def __init__(self, graph: Graph, name: str, separate: bool, dense_above: float):
        self.graph, self.name = graph, name
        self.separate, self.dense_above = separate, dense_above
        self.plan = Plan(graph, SLACK)
        self.maps = self.plan.maps
        self.data: list[str] = []
        self.binary = bytearray()
        self.body: list[str] = []
        self.runs: set[int] = set()
        self.scratch, self.phases = 0, 0

    def array(self, kind: str, values) -> str:
        """Returns the name of a constant array of kind 'int' or 'float'."""
        name = f'd{len(self.data)}'
        if self.separate:
            place = f'(const {kind} *)({self.name}_data + {len(self.binary)})'
            self.data.append(f'#define {name} ({place})')
            self.binary += np.asarray(values, '<i4' if kind == 'int' else '<f4').tobytes()
            return name
        values = [f'{v:d}' if kind == 'int' else literal(v) for v in np.ravel(values).tolist()]
        lines = [', '.join(values[i : i + 12]) for i in range(0, len(values), 12)]
        text = ',\n'.join(lines or ['0'])
        self.data.append(f'static const {kind} {name}[{max(len(values), 1)}] = {{{text}}};')
        return name

    def pointer(self, value: str) -> str:
        if value == 'logits':
            return 'logits'
        if value in self.plan.buffers:
            return f'(workspace + {self.plan.buffers[value].offset})'
        assert value == 'images', value
        return 'images'

    def entry(self, value: str, c='c', y='y', x='x') -> str:
        """Returns C for a value's entry there; along an axis of size 1 for its only one."""
        shape = self.maps[value]
        at = ('0' if n == 1 else i for n, i in zip(shape[:3], (c, y, x), strict=True))
        return f'{self.pointer(value)}[{shape.at(*at)}]'

    def expression(self, value: str, layer: str | None) -> str:
        """Returns C for the entry of a value at c, y, x; `layer`: the one whose sum is `sum`."""
        if value == layer:
            return 'sum'
        if value in self.graph.initialisers:
            array = self.graph.initialisers[value]
            if array.size == 1:
                return literal(array.item())
            if array.size != array.shape[1]:
                raise NotImplementedError(f'no C for {value}, which differs over a map')
            return f'{self.array("float", array)}[c]'
        if value not in self.plan.inlined:
            return self.entry(value)
        return self.formula(value, layer)

    def formula(self, value: str, layer: str | None) -> str:
        node = self.graph.nodes[value]
        parts = [self.expression(x, layer) for x in node.inputs]
        alpha = literal(node.attributes['alpha']) if 'alpha' in node.attributes else ''
        return FORMULAS[node.op].format(*parts, alpha=alpha)

    def loop(self, shape: Map, target: str, text: str) -> None:
        """Adds target = text at every c, y, x of a map."""
        self.body.append(
            f'  for (int c = 0; c < {shape.channels}; c++)\n'
            f'    for (int y = 0; y < {shape.height}; y++)\n'
            f'      for (int x = 0; x < {shape.width}; x++)\n'
            f'        {target} = {text};'
        )


def literal(value: float) -> str:
    text = f'{np.float32(value):.9g}'
    return f'{text}f' if any(mark in text for mark in '.en') else f'{text}.0f'
