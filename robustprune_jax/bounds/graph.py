"""A logits function as a list of affine and non-linear nodes, read off its jaxpr.

Works on one example: bounds of a batch are `jax.vmap` over this. What does not depend on the
image, such as weights, BatchNorm's statistics and masks, is computed while the graph is built and
ends up as constants (or tracers, when differentiated) inside the nodes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Literal

from robustprune_jax.bounds import conv

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


class _Ref(NamedTuple):
    """A value that depends on the image: the number of its node."""

    node: int


class _Sign(NamedTuple):
    """A comparison of a node with 0: what leaky relu selects by."""

    node: int


_PLATFORM = object()  # the number of the platform that the program runs on


def build(
    fn: Callable[[Array], Array], image: jax.ShapeDtypeStruct, dtype: np.dtype | None = None
) -> Graph:
    """Returns the graph of fn: image -> output, both without a batch axis.

    dtype: what fn's constants, also those it closes over, and its values are cast to; fn's own
    types when None. Raises NotImplementedError, naming the primitive and the line of the model,
    where fn does something that has no bound here, and ValueError where its output ignores the
    image.
    """
    closed = jax.make_jaxpr(fn)(image)
    dtype = np.dtype(dtype or image.dtype)
    graph = Graph([None], [jax.ShapeDtypeStruct(image.shape, dtype)], dtype)
    (out,) = _interpret(graph, closed.jaxpr, closed.consts, [_Ref(0)])
    if not isinstance(out, _Ref):
        raise ValueError('the logits do not depend on the image')
    if out.node != len(graph.nodes) - 1:  # the output is to be the last node
        _affine(graph, 'copy', [out], lambda x: x, lambda r: r)
    return graph


def _add_node(graph, node, shape):
    graph.nodes.append(node)
    graph.shapes.append(jax.ShapeDtypeStruct(shape.shape, shape.dtype))
    return _Ref(len(graph.nodes) - 1)


def _affine(graph, primitive, values, apply, absolute, has_constant=False, transpose=None):
    """Adds the node apply(*values); values that are no _Ref are its constants."""
    refs = [i for i, value in enumerate(values) if isinstance(value, _Ref)]

    def bind(function):
        def of_refs(*inputs):
            full = list(values)
            for i, x in zip(refs, inputs, strict=True):
                full[i] = x
            return function(*full)

        return of_refs

    inputs = tuple(values[i].node for i in refs)
    shapes = [graph.shapes[i] for i in inputs]
    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    constant = bind(apply)(*zeros) if has_constant else None
    node = Affine(primitive, inputs, bind(apply), bind(absolute), constant, transpose)
    return _add_node(graph, node, jax.eval_shape(node.apply, *shapes))


def _interpret(graph: Graph, jaxpr, consts, args) -> list:
    """The jaxpr's outputs: arrays, or _Ref where they depend on the image."""
    values = {}

    def read(atom):
        return _cast(atom.val, graph.dtype) if isinstance(atom, Literal) else values[atom]

    values.update(zip(jaxpr.constvars, [_cast(c, graph.dtype) for c in consts], strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _equation(graph, _retyped(eqn, graph.dtype), inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_float(dtype):
    return jnp.issubdtype(dtype, jnp.floating)


def _cast(value, dtype):
    if not hasattr(value, 'dtype') or value.dtype == dtype or not _is_float(value.dtype):
        return value
    return value.astype(dtype)


def _retyped(eqn, dtype):
    """The equation with `dtype` for every floating-point type among its parameters."""
    floats = {k: dtype for k, v in eqn.params.items() if isinstance(v, np.dtype) and _is_float(v)}
    return eqn.replace(params={**eqn.params, **floats})


def _equation(graph, eqn, inputs):
    name = eqn.primitive.name
    if name == 'platform_index':
        return [_PLATFORM]
    if name in _NESTED:
        inner = _closed(eqn.params[_NESTED[name]])
        return _interpret(graph, inner.jaxpr, inner.consts, inputs)
    if name == 'cond' and (branch := _branch(eqn, inputs[0])) is not None:
        return _interpret(graph, branch.jaxpr, branch.consts, inputs[1:])
    if not any(isinstance(x, _Ref | _Sign) for x in inputs):
        outputs = _bind(eqn, inputs)
        return outputs if eqn.primitive.multiple_results else [outputs]
    out = _RULES[name](graph, eqn, inputs) if name in _RULES else None
    if out is None:
        line = source_info_util.summarize(eqn.source_info)
        hint = f'there are bounds for {", ".join(sorted([*_RULES, *_NESTED]))}'
        if name in ('square', 'integer_pow', 'rsqrt', 'mul'):
            hint = (
                'if this is BatchNorm: it must be in eval mode inside a bound, and certified '
                'recipes use networks without it'
            )
        raise NotImplementedError(
            f'no bound for the primitive {name!r}, as the model uses it at {line}; {hint}'
        )
    return out if isinstance(out, list) else [out]


def _bind(eqn, inputs):
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        return eqn.primitive.bind(*inputs, **eqn.params)
    # Inside jit this would be staged, and a constant 0 no longer be known to be 0.
    with jax.ensure_compile_time_eval():
        return eqn.primitive.bind(*inputs, **eqn.params)


def _branch(eqn, index):
    """The branch that a cond takes, where that is known.

    All branches of lax.platform_dependent compute the same; its default is the last.
    """
    branches = eqn.params['branches']
    if index is _PLATFORM:
        return branches[-1]
    if isinstance(index, _Ref | _Sign | jax.core.Tracer):
        return None
    return branches[int(np.clip(index, 0, len(branches) - 1))]


def _closed(jaxpr):
    """Nested programs come as closed jaxprs, or as open ones without constants."""
    return jaxpr if hasattr(jaxpr, 'consts') else jax.extend.core.ClosedJaxpr(jaxpr, ())


# primitive -> the parameter that is the program inside it
_NESTED = {
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'checkpoint': 'jaxpr',
    'remat2': 'jaxpr',
}


def _call(eqn):
    return lambda *inputs: _bind(eqn, inputs)


def _structural(graph, eqn, inputs):
    """Moves or sums entries, with coefficients 0 and 1."""
    if any(isinstance(x, _Ref) for x in inputs[1:]):
        return None  # an index or a padding value that depends on the image
    return _affine(graph, eqn.primitive.name, inputs, _call(eqn), _call(eqn))


def _pad(graph, eqn, inputs):
    if not isinstance(inputs[0], _Ref) or isinstance(inputs[1], _Ref):
        return None
    padding = _call(eqn)
    return _affine(
        graph, 'pad', inputs, padding, lambda r, value: padding(r, jnp.zeros_like(value)), True
    )


def _concatenate(graph, eqn, inputs):
    join = _call(eqn)
    known = [not isinstance(x, _Ref) for x in inputs]

    def absolute(*radii):
        return join(*(jnp.zeros_like(r) if k else r for r, k in zip(radii, known, strict=True)))

    return _affine(graph, 'concatenate', inputs, join, absolute, any(known))


def _split(graph, eqn, inputs):
    def part(i):
        return lambda x: _bind(eqn, [x])[i]

    count = len(eqn.outvars)
    return [_affine(graph, 'split', inputs, part(i), part(i)) for i in range(count)]


def _sum(graph, eqn, inputs):
    """add and sub: radii add up either way."""
    known = [not isinstance(x, _Ref) for x in inputs]

    def absolute(*radii):
        return sum(r for r, k in zip(radii, known, strict=True) if not k)

    return _affine(graph, eqn.primitive.name, inputs, _call(eqn), absolute, any(known))


def _negate(graph, eqn, inputs):
    return _affine(graph, 'neg', inputs, _call(eqn), lambda r: r)


def _product(graph, eqn, inputs):
    """mul, dot_general, conv_general_dilated, and div by a constant."""
    name = eqn.primitive.name
    if all(isinstance(x, _Ref) for x in inputs) or (name == 'div' and isinstance(inputs[1], _Ref)):
        return None
    if name == 'conv_general_dilated' and isinstance(inputs[1], _Ref):
        return None
    apply = _call(eqn)
    known = [not isinstance(x, _Ref) for x in inputs]

    def absolute(*radii):
        return apply(*(jnp.abs(r) if k else r for r, k in zip(radii, known, strict=True)))

    transpose = conv.transpose(eqn, inputs[1]) if name == 'conv_general_dilated' else None
    return _affine(graph, name, inputs, apply, absolute, transpose=transpose)


def _max(graph, eqn, inputs):
    """max(x, c) is relu(x - c) + c; of two images' values there is no bound here."""
    x, c = inputs if isinstance(inputs[0], _Ref) else inputs[::-1]
    if isinstance(c, _Ref):
        return None
    if _is_zero(c):
        return _relu(graph, x, 0.0)
    shape = graph.shapes[x.node].shape
    c = jnp.broadcast_to(c, shape)
    shifted = _affine(graph, 'sub', [x], lambda x: x - c, lambda r: r, True)
    return _affine(graph, 'add', [_relu(graph, shifted, 0.0)], lambda x: x + c, lambda r: r, True)


def _relu(graph, x, negative_slope):
    return _add_node(graph, Relu((x.node,), negative_slope), graph.shapes[x.node])


def _compare(graph, eqn, inputs):
    if isinstance(inputs[0], _Ref) and _is_zero(inputs[1]):
        return _Sign(inputs[0].node)
    return None


def _select(graph, eqn, inputs):
    """Of a known choice; or leaky relu: a value where it is positive, else a part of it."""
    which, *cases = inputs
    if isinstance(which, _Sign):
        return _leaky_relu(graph, which.node, *cases)
    if isinstance(which, _Ref):
        return None
    known = [not isinstance(x, _Ref) for x in cases]
    select = _call(eqn)

    def absolute(which, *radii):
        zeroed = (jnp.zeros_like(r) if k else r for r, k in zip(radii, known, strict=True))
        return select(which, *zeroed)

    return _affine(graph, 'select_n', inputs, select, absolute, any(known))


def _leaky_relu(graph, node, negative, positive):
    if positive != _Ref(node) or not isinstance(negative, _Ref):
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
    return _relu(graph, _Ref(node), slope)


def _max_pool(graph, eqn, inputs):
    shape = jax.eval_shape(_call(eqn), graph.shapes[inputs[0].node])
    return _add_node(graph, MaxPool((inputs[0].node,), _call(eqn)), shape)


def _is_zero(value):
    return not isinstance(value, jax.core.Tracer) and not np.any(np.asarray(value))


_RULES = {
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
            'convert_element_type',
            'copy',
            'gather',
        ),
        _structural,
    ),
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
    'max': _max,
    'ge': _compare,
    'gt': _compare,
    'select_n': _select,
    'reduce_window_max': _max_pool,
    'reduce_max': _max_pool,
}
