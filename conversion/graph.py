"""A network as a graph of ONNX's operations, without onnx; what its values are to a JAX program."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

LAYERS = ('Conv', 'Gemm')  # multiply by a kernel


class Node(NamedTuple):
    op: str
    inputs: tuple[str, ...]
    attributes: dict


class Tensor(NamedTuple):
    """A value that depends on the images; axis i of the tensor `name` is its axis order[i].

    Flax's [B, H, W, C] lies in the order (0, 3, 1, 2), as ONNX convolves, until something needs
    another. flat: of a flattened map, the tensor that is flattened in ONNX's order instead, and the
    places of its entries in this one.
    """

    name: str
    order: tuple[int, ...]
    flat: tuple[str, np.ndarray] | None = None


class Constant(NamedTuple):
    """A value that does not. It is the same for the whole batch: that axis has size 1."""

    array: np.ndarray
    name: str = 'constant'


def on_host(array) -> np.ndarray | jax.Array:
    """Returns an array as NumPy's, but for random keys, which it has not."""
    return array if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)


@dataclass
class Graph:
    """From `images`, [batch, *image_shape], to `logits`; image_shape is (C, H, W), or a file's own.

    nodes: output's name -> node, in the order of computation; initialisers: name -> array.
    """

    image_shape: tuple[int, ...]
    nodes: dict[str, Node] = field(default_factory=dict)
    initialisers: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, op: str, inputs: Iterable[str], **attributes) -> str:
        return self.put(f'{op}.{len(self.nodes)}', op, inputs, **attributes)

    def put(self, name: str, op: str, inputs: Iterable[str], **attributes) -> str:
        self.nodes[name] = Node(op, tuple(inputs), attributes)
        return name

    def constant(self, array, name: str = 'constant') -> str:
        """The initialiser that holds `array`: of this name or, where it is taken, of name_1 ..."""
        array, unique, count = np.array(array, order='C'), name, 0
        while not _identical(self.initialisers.setdefault(unique, array), array):
            count += 1
            unique = f'{name}_{count}'
        return unique

    def ordered(self, value: Tensor | Constant, order: Iterable[int]) -> str:
        """The name of `value` with its axes in this order; of a constant scalar as it is."""
        order = tuple(order)
        if isinstance(value, Constant):
            array = value.array
            return self.constant(array.transpose(order) if array.ndim else array, value.name)
        if value.order == order:
            return value.name
        return self.add('Transpose', [value.name], perm=[value.order.index(axis) for axis in order])

    def producer(self, value: Tensor | Constant, *ops: str) -> Node | None:
        """The node that computes `value`; None where it is none of these operations."""
        node = self.nodes.get(value.name)
        return node if node and node.op in ops else None

    def scalar(self, name: str) -> float | None:
        """The number that the initialiser `name` holds; None where it is none, or not one."""
        array = self.initialisers.get(name, np.empty(0))
        return array.item() if array.size == 1 else None

    def layers(self) -> list[Node]:
        """The convolutions and dense layers, in order."""
        return [node for node in self.nodes.values() if node.op in LAYERS]

    def finish(self, output: str, name: str) -> None:
        """Renames the output, and drops what it does not need: the rules leave such nodes."""
        needed, nodes = {output}, {}
        for key, node in reversed(self.nodes.items()):
            if key in needed:
                needed.update(node.inputs)
                nodes[name if key == output else key] = node
        self.nodes = dict(reversed(nodes.items()))
        self.initialisers = {k: array for k, array in self.initialisers.items() if k in needed}


def _identical(a, b):
    return a is b or (a.dtype == b.dtype and np.array_equal(a, b))
