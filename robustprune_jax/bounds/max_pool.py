"""Maxima of windows."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.bounds import rounding
from robustprune_jax.bounds.nodes import Array, add_node, call


class MaxPool(NamedTuple):
    """value = apply(x): the largest of each window; width: how many windows may share an entry."""

    inputs: tuple[int]
    apply: Callable[[Array], Array]
    width: int

    parallel = False

    @property
    def terms(self):
        return 0, self.width

    def magnitude(self, bounds):
        return self.apply(rounding.size(*bounds))

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
        constants = negative * self.apply(upper), jnp.inf
        return constants, jax.vmap(transposed)(positive)


def max_pool(graph, eqn, inputs):
    """A maximum over windows or axes."""
    shape = jax.eval_shape(call(eqn), graph.shapes[inputs[0].node])
    width = int(np.prod(eqn.params.get('window_dimensions', 1)))
    return add_node(graph, MaxPool((inputs[0].node,), call(eqn), width), shape)
