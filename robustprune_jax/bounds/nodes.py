"""What a logits function is read into: affine and non-linear nodes of one example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Affine(NamedTuple):
    """value = apply(*inputs), affine; radius = absolute(*radii) bounds how far it moves.

    primitive: its name; constant: apply(0, ...), or None where that is 0; transpose: a quicker way
    than JAX's own to carry rows to the one input, or None.
    """

    primitive: str
    inputs: tuple[int, ...]
    apply: Callable[..., Array]
    absolute: Callable[..., Array]
    constant: Array | None
    transpose: Callable[[Array], Array] | None = None


class Relu(NamedTuple):
    """value = max(x, negative_slope * x), with 0 <= negative_slope < 1."""

    inputs: tuple[int]
    negative_slope: Any


class MaxPool(NamedTuple):
    """value = apply(x): the largest of each window."""

    inputs: tuple[int]
    apply: Callable[[Array], Array]


class Graph(NamedTuple):
    """Node 0 is the image, the last node the output.

    shapes: of the nodes' values; dtype: of all values that are floating point.
    """

    nodes: list[Affine | Relu | MaxPool | None]
    shapes: list[jax.ShapeDtypeStruct]
    dtype: np.dtype


class Ref(NamedTuple):
    """A value that depends on the image: the number of its node."""

    node: int


class Sign(NamedTuple):
    """A comparison of a node with 0: what leaky relu selects by."""

    node: int


def add_node(graph, node, shape):
    """Appends a node of the shape of `shape`, and returns its Ref."""
    graph.nodes.append(node)
    graph.shapes.append(jax.ShapeDtypeStruct(shape.shape, shape.dtype))
    return Ref(len(graph.nodes) - 1)


def affine(graph, primitive, values, apply, absolute, has_constant=False, transpose=None):
    """Adds the node apply(*values); values that are no Ref are its constants."""
    refs = [i for i, value in enumerate(values) if isinstance(value, Ref)]

    def given_constants(function):
        def of_refs(*inputs):
            full = list(values)
            for i, x in zip(refs, inputs, strict=True):
                full[i] = x
            return function(*full)

        return of_refs

    inputs = tuple(values[i].node for i in refs)
    shapes = [graph.shapes[i] for i in inputs]
    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    constant = given_constants(apply)(*zeros) if has_constant else None
    of_inputs, of_radii = given_constants(apply), given_constants(absolute)
    node = Affine(primitive, inputs, of_inputs, of_radii, constant, transpose)
    return add_node(graph, node, jax.eval_shape(node.apply, *shapes))


def bind(eqn, inputs):
    """Returns what the equation computes of `inputs`: one value, or a list of them."""
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        return eqn.primitive.bind(*inputs, **eqn.params)
    # Inside jit this would be staged, and a constant 0 no longer be known to be 0.
    with jax.ensure_compile_time_eval():
        return eqn.primitive.bind(*inputs, **eqn.params)
