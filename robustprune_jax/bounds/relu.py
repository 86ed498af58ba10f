"""Relu and leaky relu, and the lines between which they lie where their sign is not decided."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.bounds import rounding
from robustprune_jax.bounds.affine import Affine, affine
from robustprune_jax.bounds.nodes import Array, Ref, add_node, is_zero


def crown_slope(upper_slope: Array, negative_slope: Array) -> Array:
    """CROWN's lower slope: 1 where the upper one is at least a half, else the negative side's."""
    return jnp.where(upper_slope >= 0.5, 1, negative_slope)


def parallel_slope(upper_slope: Array, negative_slope: Array) -> Array:
    """The zonotope's (Fast-Lin's) lower slope: the same as the upper one."""
    return upper_slope


class Relu(NamedTuple):
    """value = max(x, negative_slope * x), with 0 <= negative_slope < 1."""

    inputs: tuple[int]
    negative_slope: Any

    parallel = True
    terms = 16, 16  # the chord's slope and intercept are rounded too

    def magnitude(self, bounds):
        return rounding.size(*bounds)

    def undecided(self, lower, upper):
        return (lower < 0) & (upper > 0)

    def interval(self, bounds):
        lower, upper = bounds
        slope = self.negative_slope
        return jnp.maximum(lower, slope * lower), jnp.maximum(upper, slope * upper)

    def backward(self, rows, lower_slope, bounds):
        positive, negative = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
        above, intercept, below = self.lines(*bounds, lower_slope)
        constants = negative * intercept, positive * intercept
        return constants, [positive * below + negative * above]

    def lines(self, lower, upper, lower_slope):
        """Returns the slope and intercept of the upper line, and the slope of the lower one."""
        slope, unstable = self.negative_slope, self.undecided(lower, upper)
        # A slope below the chord's is sound too, and widths near 0 would overflow its derivative.
        width = jnp.where(unstable, jnp.maximum(upper - lower, 1e-12), 1)
        crossing = (upper - slope * lower) / width
        stable = jnp.where(upper > 0, 1, slope)
        above = jnp.where(unstable, crossing, stable)
        below = jnp.where(unstable, lower_slope(crossing, slope), stable)
        intercept = jnp.where(unstable, upper - crossing * upper, 0)
        return above, intercept, below


def maximum(graph, eqn, inputs):
    """max(x, c) is relu(x - c) + c; of two images' values there is no bound here."""
    x, c = inputs if isinstance(inputs[0], Ref) else inputs[::-1]
    if isinstance(c, Ref):
        return None
    if is_zero(c):
        return _relu(graph, x, 0.0)
    c = jnp.broadcast_to(c, graph.shapes[x.node].shape)
    shifted = affine(graph, 'sub', [x], lambda x: x - c, lambda r: r, True)
    return affine(graph, 'add', [_relu(graph, shifted, 0.0)], lambda x: x + c, lambda r: r, True)


def leaky(graph, node, negative, positive):
    """A node where it is positive, else a part of it: the choice that leaky relu is written as."""
    if positive != Ref(node) or not isinstance(negative, Ref):
        return None
    scaled = graph.nodes[negative.node]
    if not (isinstance(scaled, Affine) and scaled.primitive == 'mul' and scaled.inputs == (node,)):
        return None
    with jax.ensure_compile_time_eval():
        slope = scaled.apply(jnp.ones(graph.shapes[node].shape, graph.shapes[node].dtype))
    if isinstance(slope, jax.core.Tracer):
        return None
    slope = np.asarray(slope)
    if not np.all((slope >= 0) & (slope < 1)):
        return None
    return _relu(graph, Ref(node), slope)


def _relu(graph, x, negative_slope):
    return add_node(graph, Relu((x.node,), negative_slope), graph.shapes[x.node])
