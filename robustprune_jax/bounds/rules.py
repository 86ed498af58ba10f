"""RULES maps a primitive to (graph, equation, inputs) -> its node: what has a bound.

Inputs are arrays, or Ref where they depend on the image. A rule returns a Ref, a Sign, a list of
them, or None where the primitive is used in a way that has no bound.
"""

import jax.numpy as jnp

from robustprune_jax.bounds import conv, curves, max_pool, relu
from robustprune_jax.bounds.affine import MIXING, affine
from robustprune_jax.bounds.nodes import Ref, Sign, bind, call, is_zero
from robustprune_jax.bounds.product import product


def _structural(graph, eqn, inputs):
    """Moves or sums entries, with coefficients 0 and 1."""
    if any(isinstance(x, Ref) for x in inputs[1:]):
        return None  # an index or a padding value that depends on the image
    name = eqn.primitive.name
    terms = MIXING[name](eqn) if name in MIXING else None
    if name == 'gather':
        terms = 1, eqn.outvars[0].aval.size  # the same entry, maybe, everywhere
    return affine(graph, name, inputs, call(eqn), call(eqn), terms=terms)


def _convert(graph, eqn, inputs):
    """Between types of floats: a cast to integers is a step function."""
    if not jnp.issubdtype(eqn.params['new_dtype'], jnp.floating):
        return None
    return _structural(graph, eqn, inputs)


def _pad(graph, eqn, inputs):
    if not isinstance(inputs[0], Ref) or isinstance(inputs[1], Ref):
        return None
    padding = call(eqn)
    return affine(
        graph, 'pad', inputs, padding, lambda r, value: padding(r, jnp.zeros_like(value)), True
    )


def _concatenate(graph, eqn, inputs):
    join = call(eqn)
    known = [not isinstance(x, Ref) for x in inputs]

    def absolute(*radii):
        return join(*(jnp.zeros_like(r) if k else r for r, k in zip(radii, known, strict=True)))

    return affine(graph, 'concatenate', inputs, join, absolute, any(known))


def _split(graph, eqn, inputs):
    def part(i):
        return lambda x: bind(eqn, [x])[i]

    count = len(eqn.outvars)
    return [affine(graph, 'split', inputs, part(i), part(i)) for i in range(count)]


def _sum(graph, eqn, inputs):
    """add and sub: radii add up either way."""
    known = [not isinstance(x, Ref) for x in inputs]

    def absolute(*radii):
        return sum(r for r, k in zip(radii, known, strict=True) if not k)

    return affine(graph, eqn.primitive.name, inputs, call(eqn), absolute, any(known))


def _negate(graph, eqn, inputs):
    return affine(graph, 'neg', inputs, call(eqn), lambda r: r)


def _product(graph, eqn, inputs):
    """mul and div; dot_general and conv_general_dilated with constants."""
    name = eqn.primitive.name
    if name == 'div' and isinstance(inputs[1], Ref):
        return curves.quotient(graph, *inputs)
    if all(isinstance(x, Ref) for x in inputs):
        if name != 'mul':
            return None
        x, y = inputs
        return curves.curve(graph, jnp.square, 'square', x) if x == y else product(graph, x, y)
    if name == 'conv_general_dilated' and isinstance(inputs[1], Ref):
        return None
    apply = call(eqn)
    known = [not isinstance(x, Ref) for x in inputs]

    def absolute(*radii):
        return apply(*(jnp.abs(r) if k else r for r, k in zip(radii, known, strict=True)))

    transpose = conv.transpose(eqn, inputs[1]) if name == 'conv_general_dilated' else None
    terms = MIXING[name](eqn) if name in MIXING else None
    return affine(graph, name, inputs, apply, absolute, transpose=transpose, terms=terms)


def _compare(graph, eqn, inputs):
    if isinstance(inputs[0], Ref) and is_zero(inputs[1]):
        return Sign(inputs[0].node)
    return None


def _select(graph, eqn, inputs):
    """Of a known choice; or leaky relu: a value where it is positive, else a part of it."""
    which, *cases = inputs
    if isinstance(which, Sign):
        return relu.leaky(graph, which.node, *cases)
    if isinstance(which, Ref):
        return None
    known = [not isinstance(x, Ref) for x in cases]
    select = call(eqn)

    def absolute(which, *radii):
        zeroed = (jnp.zeros_like(r) if k else r for r, k in zip(radii, known, strict=True))
        return select(which, *zeroed)

    return affine(graph, 'select_n', inputs, select, absolute, any(known))


RULES = {
    **dict.fromkeys(curves.SHAPES, curves.entrywise),
    'erfc': curves.error_function_complement,
    'integer_pow': curves.power,
    **dict.fromkeys(
        (
            'reshape',
            'transpose',
            'broadcast_in_dim',
            'squeeze',
            'expand_dims',
            'slice',
            'dynamic_slice',
            'rev',
            'reduce_sum',
            'reduce_window_sum',
            'cumsum',
            'copy',
            'gather',
        ),
        _structural,
    ),
    'convert_element_type': _convert,
    'pad': _pad,
    'concatenate': _concatenate,
    'stack': _concatenate,
    'split': _split,
    'unstack': _split,
    'add': _sum,
    'add_any': _sum,
    'sub': _sum,
    'neg': _negate,
    'mul': _product,
    'div': _product,
    'dot_general': _product,
    'conv_general_dilated': _product,
    'max': relu.maximum,
    'ge': _compare,
    'gt': _compare,
    'select_n': _select,
    'reduce_window_max': max_pool.max_pool,
    'reduce_max': max_pool.max_pool,
}
