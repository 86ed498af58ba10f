"""Affine operations, of one or more inputs: bounds through them lose nothing to a relaxation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.bounds import rounding
from robustprune_jax.bounds.nodes import Array, Ref, add_node


def _dot_terms(eqn):
    (x, y), out = (v.aval for v in eqn.invars), eqn.outvars[0].aval
    summed = int(np.prod([x.shape[i] for i in eqn.params['dimension_numbers'][0][0]]))
    return summed, max(out.size * summed // min(x.size, y.size), 1)


def _conv_terms(eqn):
    kernel, numbers = eqn.invars[1].aval, eqn.params['dimension_numbers']
    out_features, features = (kernel.shape[i] for i in numbers.rhs_spec[:2])
    return kernel.size // out_features, kernel.size // features


def _window_terms(eqn):
    return (int(np.prod(eqn.params['window_dimensions'])),) * 2


# Those that sum inputs: a chain with two of them is bounded more tightly as a whole. Of how many
# products an entry is the sum, of the value and of a row carried backward.
MIXING = {
    'dot_general': _dot_terms,
    'conv_general_dilated': _conv_terms,
    'reduce_sum': lambda eqn: (eqn.invars[0].aval.size // eqn.outvars[0].aval.size, 1),
    'reduce_window_sum': _window_terms,
    'cumsum': lambda eqn: (eqn.invars[0].aval.shape[eqn.params['axis']],) * 2,
}


class Affine(NamedTuple):
    """value = apply(*inputs), affine; radius = absolute(*radii) bounds how far it moves.

    primitive: its name; constant: apply(0, ...), or None where that is 0; transpose: a row of the
    value -> its part for each input.
    """

    primitive: str
    inputs: tuple[int, ...]
    apply: Callable[..., Array]
    absolute: Callable[..., Array]
    constant: Array | None
    transpose: Callable[[Array], tuple[Array, ...]]
    terms: tuple[int, int]

    parallel = True

    def magnitude(self, *bounds):
        sizes = [rounding.size(*pair) for pair in bounds]
        least = rounding.FLOOR * max(self.terms) * sum(jnp.max(s, initial=0) for s in sizes)
        constant = 0 if self.constant is None else jnp.abs(self.constant)
        total = self.absolute(*sizes) + constant + least
        return total * (1 + rounding.gamma(self.terms[0], total.dtype))

    def interval(self, *bounds):
        """In centre and radius form: |W| is applied to the radius once."""
        center = self.apply(*((upper + lower) / 2 for lower, upper in bounds))
        radius = self.absolute(*((upper - lower) / 2 for lower, upper in bounds))
        return center - radius, center + radius

    def backward(self, rows, lower_slope, *bounds):
        constants = None
        if self.constant is not None:
            constants = (rows * self.constant,) * 2
        return constants, jax.vmap(self.transpose)(rows)


def affine(
    graph, primitive, values, apply, absolute, has_constant=False, transpose=None, terms=None
):
    """Adds the node apply(*values); values that are no Ref are its constants.

    transpose: a quicker way than JAX's own to carry a row to the inputs; terms: those of a node,
    where it does more than to sum its inputs and to repeat their entries.
    """
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
    of_inputs, of_radii = given_constants(apply), given_constants(absolute)
    constant = of_inputs(*zeros) if has_constant else None

    def linear(*inputs):
        out = of_inputs(*inputs)
        return out if constant is None else out - constant

    def transposed(row):
        return jax.linear_transpose(linear, *shapes)(row)

    shape = jax.eval_shape(of_inputs, *shapes)
    if terms is None:
        terms = len(values), max(-(-shape.size // max(s.size, 1)) for s in shapes)
    node = Affine(primitive, inputs, of_inputs, of_radii, constant, transpose or transposed, terms)
    return add_node(graph, node, shape)
