"""A logits function as a list of affine and non-linear nodes, read off its jaxpr.

Works on one example: bounds of a batch are `jax.vmap` over this. What does not depend on the
image, such as weights, BatchNorm's statistics and masks, is computed while the graph is built and
ends up as constants (or tracers, when differentiated) inside the nodes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.bounds.affine import affine
from robustprune_jax.bounds.nodes import Graph, Ref, Sign, bind
from robustprune_jax.bounds.rules import RULES
from robustprune_jax.graph.interpret import interpret, place


def build(
    fn: Callable[[jax.Array], jax.Array], image: jax.ShapeDtypeStruct, dtype: np.dtype | None = None
) -> Graph:
    """Returns the graph of fn: image -> output, both without a batch axis.

    dtype: what fn's constants, also those it closes over, and its values are cast to; fn's own
    types when None. Raises NotImplementedError, naming the primitive and the line of the model,
    where fn does something that has no bound here, and ValueError where its output ignores the
    image.
    """
    program = jax.make_jaxpr(fn)(image)
    dtype = np.dtype(dtype or image.dtype)
    graph = Graph([None], [jax.ShapeDtypeStruct(image.shape, dtype)], dtype)
    (out,) = _interpret(graph, program, [Ref(0)])
    if not isinstance(out, Ref):
        raise ValueError('the logits do not depend on the image')
    if out.node != len(graph.nodes) - 1:  # the output is to be the last node
        affine(graph, 'copy', [out], lambda x: x, lambda r: r)
    return graph


def _interpret(graph: Graph, program, args, callers=()) -> list:
    """The program's outputs: arrays, or Ref where they depend on the image."""
    return interpret(
        program, args, partial(_equation, graph), lambda value: _cast(value, graph.dtype), callers
    )


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


def _equation(graph, eqn, inputs, nested):
    eqn, name = _retyped(eqn, graph.dtype), eqn.primitive.name
    if name == 'cond' and not isinstance(inputs[0], Ref | Sign | jax.core.Tracer):
        branches = eqn.params['branches']
        branch = branches[int(np.clip(inputs[0], 0, len(branches) - 1))]
        return _interpret(graph, branch, inputs[1:], nested)
    if not any(isinstance(x, Ref | Sign) for x in inputs):
        outputs = bind(eqn, inputs)
        return outputs if eqn.primitive.multiple_results else [outputs]
    # What a comparison says is no number: it can only select. And BatchNorm that measures would
    # measure one image.
    has_rule = (
        name in RULES
        and (name == 'select_n' or not any(isinstance(x, Sign) for x in inputs))
        and not (name == 'rsqrt' and _in_batch_norm(nested))
    )
    out = RULES[name](graph, eqn, inputs) if has_rule else None
    if out is None:
        raise NotImplementedError(_refusal(nested))
    return out if isinstance(out, list) else [out]


def _in_batch_norm(nested) -> bool:
    frames = [f for e in nested if e.source_info.traceback for f in e.source_info.traceback.frames]
    return any('BatchNorm' in frame.function_name for frame in frames)


def _refusal(nested) -> str:
    """What has no bound, where the model uses it, and what would have one."""
    name = nested[-1].primitive.name
    if _in_batch_norm(nested):
        hint = (
            'BatchNorm must be in eval mode inside a bound, and certified recipes use networks '
            'without it'
        )
    elif name == 'convert_element_type':
        hint = 'casts to integers, and comparisons as numbers, are steps'
    else:
        hint = f'there are bounds for {", ".join(sorted(RULES))}'
    return f'no bound for the primitive {name!r}, as the model uses it at {place(nested)}; {hint}'
