"""What a logits function is read into: a list of nodes, the operations on one example.

A kind of node is a NamedTuple that brings its own rules, so that an operation is added by one kind
and the line of `rules.RULES` that makes a node of it. Bounds are (lower, upper), arrays of a
value's shape; rows [S, ...] are S linear functions of a value. A kind has:

- inputs: the numbers of the nodes that it reads;
- interval(*bounds of the inputs) -> bounds of its value;
- backward(rows, lower_slope, *bounds of the inputs) -> constants, parts: rows(value) is at least
  low + the sum of each part(input), where constants are (low, high), [S] or terms [S, ...] to sum,
  or None for zeros, and parts rows of the inputs. lower_slope: how a relu is relaxed, crown_slope
  or parallel_slope;
- parallel: whether under parallel_slope rows(value) is at most high + the same sum;
- undecided(lower, upper): of which entries of an input tighter bounds would help. An affine node
  relaxes nothing and needs none;
- terms, magnitude(*bounds of the inputs), where its bounds can be made sound in floating point: an
  entry of the value, and one of a part, are sums of at most terms[0] and terms[1] products; each
  entry of the value of products whose magnitudes are at most `magnitude` in all.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array


class Graph(NamedTuple):
    """Node 0 is the image, None; the last node is the output.

    shapes: of the nodes' values; dtype: of all values that are floating point.
    """

    nodes: list[Any]
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


def bind(eqn, inputs):
    """Returns what the equation computes of `inputs`: one value, or a list of them."""
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        return eqn.primitive.bind(*inputs, **eqn.params)
    # Inside jit this would be staged, and a constant 0 no longer be known to be 0.
    with jax.ensure_compile_time_eval():
        return eqn.primitive.bind(*inputs, **eqn.params)


def call(eqn):
    """Returns the equation as a function of its inputs."""
    return lambda *inputs: bind(eqn, inputs)


def is_zero(value) -> bool:
    """Returns whether a constant is known to be 0 everywhere."""
    return not isinstance(value, jax.core.Tracer) and not np.any(np.asarray(value))


def row_sum(rows: Array) -> Array:
    """Returns the sum of each row [S] of [S, ...]."""
    return rows.reshape(len(rows), -1).sum(axis=1)
