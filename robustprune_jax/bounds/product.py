"""Products, entry by entry, of two values that depend on the image (McCormick 1976)."""

from typing import NamedTuple

import jax.numpy as jnp

from robustprune_jax.bounds import rounding
from robustprune_jax.bounds.affine import affine
from robustprune_jax.bounds.nodes import add_node


class Product(NamedTuple):
    """value = x * y. Above l_y x + l_x y - l_x l_y, below u_y x + l_x y - l_x u_y."""

    inputs: tuple[int, int]

    parallel = False
    terms = 4, 4

    def magnitude(self, x, y):
        return rounding.size(*x) * rounding.size(*y)

    def undecided(self, lower, upper):
        return jnp.ones(lower.shape, bool)

    def interval(self, *bounds):
        corners = [x * y for x in bounds[0] for y in bounds[1]]
        return jnp.min(jnp.stack(corners), axis=0), jnp.max(jnp.stack(corners), axis=0)

    def backward(self, rows, lower_slope, x, y):
        positive, negative = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
        of_x = positive * y[0] + negative * y[1]
        return (-of_x * x[0], jnp.inf), [of_x, rows * x[0]]


def product(graph, x, y):
    """Adds x * y, of one shape or with axes of size 1."""
    shape = jnp.broadcast_shapes(*(graph.shapes[ref.node].shape for ref in (x, y)))
    x, y = (_spread(graph, ref, shape) for ref in (x, y))
    return add_node(graph, Product((x.node, y.node)), graph.shapes[x.node])


def _spread(graph, ref, shape):
    if graph.shapes[ref.node].shape == shape:
        return ref

    def spread(x):
        return jnp.broadcast_to(x, shape)

    return affine(graph, 'broadcast_in_dim', [ref], spread, spread)
