"""Functions of one number, entry by entry, between lines that hold over an interval.

A convex function lies below its chord and above its tangents, here that in the middle; a concave
one the other way round. One that is convex and then concave, both ways monotone ("S-shaped"), has
its least derivative over an interval at an end, and lies between the two lines of that slope
through its ends (Singh et al. 2018, DeepZ).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.bounds.affine import affine
from robustprune_jax.bounds.nodes import Array, Ref, add_node, row_sum
from robustprune_jax.bounds.product import product

_NARROW = 1e-6  # widths below which a chord is taken for the tangent


def _derivative(function, x):
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


def _s_shaped(function, lower, upper):
    slope = jnp.minimum(_derivative(function, lower), _derivative(function, upper))
    below, above = function(lower) - slope * lower, function(upper) - slope * upper
    return (slope, below), (slope, above)


def _convex(function, lower, upper):
    middle = (lower + upper) / 2
    tangent = _derivative(function, middle)
    wide = upper - lower > _NARROW
    rise = (function(upper) - function(lower)) / jnp.where(wide, upper - lower, 1)
    chord = jnp.where(wide, rise, tangent)
    # Through the end that is higher above the chord, should rounding tell them apart.
    above = jnp.maximum(function(lower) - chord * lower, function(upper) - chord * upper)
    return (tangent, function(middle) - tangent * middle), (chord, above)


def _concave(function, lower, upper):
    below, above = _convex(lambda x: -function(x), lower, upper)
    return (-above[0], -above[1]), (-below[0], -below[1])


def _reciprocal(function, lower, upper):
    """Convex above 0 and concave below."""
    pairs = zip(_convex(function, lower, upper), _concave(function, lower, upper), strict=True)
    return [tuple(jnp.where(lower > 0, a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]


class Shape(NamedTuple):
    """lines(function, lower, upper) -> (slope, intercept) of a line below and of one above; turns:
    whether its least value is at 0; domain: where it is defined, (lower, upper) -> bool."""

    lines: Callable
    turns: bool = False
    domain: Callable[[Array, Array], Array] = lambda lower, upper: lower <= upper


def _positive(lower, upper):
    return lower > 0


def _one_sign(lower, upper):
    return (lower > 0) | (upper < 0)


SHAPES: dict[str, Shape] = {
    'abs': Shape(_convex, turns=True),
    'erf': Shape(_s_shaped),
    'exp': Shape(_convex),
    'expm1': Shape(_convex),
    'log': Shape(_concave, domain=_positive),
    'log1p': Shape(_concave, domain=lambda lower, upper: lower > -1),
    'logistic': Shape(_s_shaped),
    'reciprocal': Shape(_reciprocal, domain=_one_sign),
    'rsqrt': Shape(_convex, domain=_positive),
    'sqrt': Shape(_concave, domain=_positive),
    'square': Shape(_convex, turns=True),
    'tanh': Shape(_s_shaped),
}


class Curve(NamedTuple):
    """value = function(x), entry by entry; -inf to inf where an interval leaves its domain."""

    inputs: tuple[int]
    function: Callable[[Array], Array]
    shape: Shape

    parallel = False

    def undecided(self, lower, upper):
        return jnp.ones(lower.shape, bool)

    def interval(self, bounds):
        lower, upper = bounds
        ends = self.function(lower), self.function(upper)
        least = self.function(jnp.clip(0, lower, upper)) if self.shape.turns else ends[0]
        defined = self.shape.domain(lower, upper)
        low = jnp.where(defined, jnp.minimum(jnp.minimum(*ends), least), -jnp.inf)
        return low, jnp.where(defined, jnp.maximum(*ends), jnp.inf)

    def backward(self, rows, lower_slope, bounds):
        positive, negative = jnp.maximum(rows, 0), jnp.minimum(rows, 0)
        below, above = self.shape.lines(self.function, *bounds)
        low = row_sum(positive * below[1] + negative * above[1])
        return (low, jnp.inf), [positive * below[0] + negative * above[0]]


def curve(graph: Any, function: Callable[[Array], Array], name: str, x: Ref) -> Ref:
    """Adds a node of the shape `name`."""
    return add_node(graph, Curve((x.node,), function, SHAPES[name]), graph.shapes[x.node])


def entrywise(graph, eqn, inputs):
    """A function whose name is that of its shape."""
    return curve(graph, lambda x: eqn.primitive.bind(x, **eqn.params), eqn.primitive.name, *inputs)


def error_function_complement(graph, eqn, inputs):
    """1 - erf(x)."""
    found = curve(graph, jax.lax.erf, 'erf', *inputs)
    return affine(graph, 'sub', [found], lambda x: 1 - x, lambda r: r, True)


def power(graph, eqn, inputs):
    """x ** y of a whole y: an even power, times x where y is odd, of 1 / x where y is below 0."""
    (x,), exponent = inputs, eqn.params['y']
    if exponent < 0:
        x = curve(graph, lambda x: 1 / x, 'reciprocal', x)
    return _power(graph, x, abs(exponent))


def _power(graph, x, exponent):
    if exponent == 1:
        return x
    if exponent % 2:
        return product(graph, x, _power(graph, x, exponent - 1))
    return curve(graph, lambda x: jax.lax.integer_pow(x, exponent), 'square', x)


def quotient(graph, x, y):
    """x / y, where y depends on the image; x may not."""
    inverse = curve(graph, lambda y: 1 / y, 'reciprocal', y)
    if isinstance(x, Ref):
        return product(graph, x, inverse)
    return affine(graph, 'mul', [inverse], lambda y: x * y, lambda r: jnp.abs(x) * r)
