"""Affine operations, of one or more inputs: bounds through them lose nothing to a relaxation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.bounds.nodes import Array, Ref, add_node, row_sum

# Those that sum inputs: a chain with two of them is bounded more tightly as a whole.
MIXING = {'dot_general', 'conv_general_dilated', 'reduce_sum', 'reduce_window_sum', 'cumsum'}


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

    parallel = True

    def interval(self, *bounds):
        """In centre and radius form: |W| is applied to the radius once."""
        center = self.apply(*((upper + lower) / 2 for lower, upper in bounds))
        radius = self.absolute(*((upper - lower) / 2 for lower, upper in bounds))
        return center - radius, center + radius

    def backward(self, rows, lower_slope, *bounds):
        constants = None
        if self.constant is not None:
            constants = (row_sum(rows * self.constant),) * 2
        return constants, jax.vmap(self.transpose)(rows)


def affine(graph, primitive, values, apply, absolute, has_constant=False, transpose=None):
    """Adds the node apply(*values); values that are no Ref are its constants.

    transpose: a quicker way than JAX's own to carry a row to the inputs.
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

    node = Affine(primitive, inputs, of_inputs, of_radii, constant, transpose or transposed)
    return add_node(graph, node, jax.eval_shape(of_inputs, *shapes))
