"""A logits function as a list of affine and non-linear nodes, read off its jaxpr.

Works on one example: bounds of a batch are `jax.vmap` over this. What does not depend on the
image, such as weights, BatchNorm's statistics and masks, is computed while the graph is built and
ends up as constants (or tracers, when differentiated) inside the nodes.
"""

import os
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Literal

from robustprune_jax.bounds.nodes import Graph, Ref, Sign, affine, bind
from robustprune_jax.bounds.rules import RULES

# What a user reads is to be a line of the model, not of the layers that it is made of.
source_info_util.register_exclusion(os.path.dirname(flax.__file__))

_PLATFORM = object()  # the number of the platform that the program runs on


def build(
    fn: Callable[[jax.Array], jax.Array], image: jax.ShapeDtypeStruct, dtype: np.dtype | None = None
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
    (out,) = _interpret(graph, closed.jaxpr, closed.consts, [Ref(0)])
    if not isinstance(out, Ref):
        raise ValueError('the logits do not depend on the image')
    if out.node != len(graph.nodes) - 1:  # the output is to be the last node
        affine(graph, 'copy', [out], lambda x: x, lambda r: r)
    return graph


def _interpret(graph: Graph, jaxpr, consts, args, callers=()) -> list:
    """The jaxpr's outputs: arrays, or Ref where they depend on the image.

    callers: the equations that the jaxpr is nested in, outermost first.
    """
    values = {}

    def read(atom):
        return _cast(atom.val, graph.dtype) if isinstance(atom, Literal) else values[atom]

    values.update(zip(jaxpr.constvars, [_cast(c, graph.dtype) for c in consts], strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _equation(graph, _retyped(eqn, graph.dtype), inputs, callers)
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


def _equation(graph, eqn, inputs, callers):
    name, nested = eqn.primitive.name, (*callers, eqn)
    if name == 'platform_index':
        return [_PLATFORM]
    if name in _NESTED:
        inner = _closed(eqn.params[_NESTED[name]])
        return _interpret(graph, inner.jaxpr, inner.consts, inputs, nested)
    if name == 'cond' and (branch := _branch(eqn, inputs[0])) is not None:
        return _interpret(graph, branch.jaxpr, branch.consts, inputs[1:], nested)
    if not any(isinstance(x, Ref | Sign) for x in inputs):
        outputs = bind(eqn, inputs)
        return outputs if eqn.primitive.multiple_results else [outputs]
    # What a comparison says is no number: it can only select.
    has_rule = name in RULES and (
        name == 'select_n' or not any(isinstance(x, Sign) for x in inputs)
    )
    out = RULES[name](graph, eqn, inputs) if has_rule else None
    if out is None:
        raise NotImplementedError(_refusal(nested))
    return out if isinstance(out, list) else [out]


def _refusal(nested) -> str:
    """What has no bound, where the model uses it, and what would have one."""
    name = nested[-1].primitive.name
    # jax keeps of a nested program only its own part of the stack, often nothing of the user's.
    lines = [source_info_util.summarize(eqn.source_info) for eqn in nested]
    line = next(filter(None, reversed(lines)), 'an unknown line')
    calls = {
        frame.function_name.split('.')[0]
        for eqn in nested
        if eqn.source_info.traceback
        for frame in eqn.source_info.traceback.frames
    }
    norms = sorted(call for call in calls if call.endswith('Norm'))
    if any('BatchNorm' in norm for norm in norms):
        hint = (
            'BatchNorm must be in eval mode inside a bound, and certified recipes use networks '
            'without it'
        )
    elif norms:
        hint = f'{norms[0]} divides by what it measures in the image: take BatchNorm, or none'
    elif name == 'convert_element_type':
        hint = 'casts to integers, and comparisons as numbers, are steps'
    else:
        hint = 'there are bounds for affine functions, relu, leaky relu and maxima of windows'
    return f'no bound for the primitive {name!r}, as the model uses it at {line}; {hint}'


def _branch(eqn, index):
    """The branch that a cond takes, where that is known.

    All branches of lax.platform_dependent compute the same; its default is the last.
    """
    branches = eqn.params['branches']
    if index is _PLATFORM:
        return branches[-1]
    if isinstance(index, Ref | Sign | jax.core.Tracer):
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
