"""Maxima of windows."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.bounds.nodes import Array, add_node, call, row_sum


class MaxPool(NamedTuple):
    """value = apply(x): the largest of each window."""

    inputs: tuple[int]
    apply: Callable[[Array], Array]

    parallel = False

    def undecided(self, lower, upper):
        return jnp.ones(lower.shape, bool)

    def interval(self, bounds):
        lower, upper = bounds
        return self.apply(lower), self.apply(upper)

    def backward(self, rows, lower_slope, bounds):
        """A maximum is at least its entry of largest lower bound, and at most the largest upper
        one."""
        lower, upper = bounds
        positive, negative = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
        _, transposed = jax.vjp(self.apply, lower)
        constants = row_sum(negative * self.apply(upper)), jnp.inf
        return constants, jax.vmap(transposed)(positive)


def max_pool(graph, eqn, inputs):
    """A maximum over windows or axes."""
    shape = jax.eval_shape(call(eqn), graph.shapes[inputs[0].node])
    return add_node(graph, MaxPool((inputs[0].node,), call(eqn)), shape)
