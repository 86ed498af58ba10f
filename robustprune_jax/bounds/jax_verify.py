"""Bounds of PyPI's jax_verify 1.0 (2020), an independent engine to check the native one against."""

import importlib
import sys
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from robustprune_jax.graph.interpret import interpret


def _import():
    """Returns modules of jax_verify, which see a `jax` that has the names of 2020 too."""
    calls = SimpleNamespace(custom_jvp_call_jaxpr_p=None, xla_call_p=None)  # see _inlined
    old = {'core': core, 'custom_derivatives': calls, 'xla': calls, 'tree_map': jax.tree.map}
    naryop = {'standard_naryop': lambda types, name: core.Primitive(name)}
    old['lax'] = SimpleNamespace(**vars(lax) | naryop)
    sys.modules['jax'] = SimpleNamespace(**vars(jax) | old)
    try:
        modules = ('bound_propagation', 'crown_ibp', 'ibp')
        return [importlib.import_module(f'jax_verify.src.{name}') for name in modules]
    except ModuleNotFoundError as error:
        message = f"no {error.name}, for engine='jax_verify': pip install 'robustprune_jax[verify]'"
        raise ModuleNotFoundError(message) from None
    finally:
        sys.modules['jax'] = jax


_Unknown = namedtuple('_Unknown', 'aval')  # ad.UndefinedPrimal, and a pytree as it was then


def _transpose(primitive):
    def transposed(rows, x, y, **params):
        if isinstance(x, _Unknown):
            (out,) = jax.linear_transpose(lambda x: primitive.bind(x, y, **params), x.aval)(rows)
            return out, None
        return None, *jax.linear_transpose(lambda y: primitive.bind(x, y, **params), y.aval)(rows)

    return transposed


_propagation, _crown, _ibp = _import()
_crown.ad = SimpleNamespace(UndefinedPrimal=_Unknown, get_primitive_transpose=_transpose)


def _inlined(program, *args):
    """The program's outputs; traced, it has no calls, and no two values share a variable."""

    def bind(eqn, inputs, nested):
        outputs = eqn.primitive.bind(*inputs, **eqn.params)
        return outputs if eqn.primitive.multiple_results else [outputs]

    return interpret(program, args, bind)


def _interval_relu(index, rows, x, threshold):
    """Relu between two constants: so ibp gets the rows merged into the last layer."""
    values = _ibp.IntervalBound(jnp.maximum(x.lower, threshold), jnp.maximum(x.upper, threshold))
    bound = _crown.concretize_backward_bound(rows, values)
    zero = jnp.zeros_like(rows.lower_lin.lin_coeffs)
    lower, upper = (_crown.LinearExpression(zero, b) for b in (bound.lower, bound.upper))
    return _crown.CrownBackwardBound(lower, upper), None


def _only(rows):
    """Instead of jax_verify's sum, which counts constants twice where two paths meet."""
    if len(rows) != 1:
        raise NotImplementedError('a value that is used more than once')
    return rows[0]


_IBP = _propagation.OpwiseBoundTransform(
    _ibp._input_transform,
    _ibp._primitive_transform | {lax.mul_p: lambda index, x, y, **new: _ibp._ibp_mul(x, y)},
)
_CROWN = _crown._primitive_transform | {
    lax.reshape_p: lambda index, rows, x, **new: _crown._crown_reshape(rows, x, None, None),
    lax.sub_p: lambda index, rows, x, c: _crown._crown_add(rows, x, -c),  # not + c
}
_TRANSFORMS = {'ibp': _CROWN | {lax.max_p: _interval_relu}, 'crown_ibp': _CROWN}


@partial(jax.jit, static_argnames='method')
def lower_bounds(logits_fn, lower, upper, spec, method):
    """Returns lower bounds [B, S] of spec [B, S, K] @ logits over the boxes of [B, H, W, C]."""

    def margins(x):
        return lax.dot_general(logits_fn(x), spec, (((1,), (2,)), ((0,), (0,))))

    program = jax.make_jaxpr(margins)(lower)
    program = jax.make_jaxpr(partial(_inlined, program))(lower)
    graph = _propagation.PropagationGraph(program.jaxpr, lambda jaxpr: jaxpr)
    box = _ibp.IntervalBound(lower, upper)
    units = jnp.tile(jnp.eye(spec.shape[1]), (len(spec), 1, 1))
    rows = _crown.LinearExpression(units, jnp.zeros(spec.shape[:2]))
    rows = _crown.CrownBackwardBound(rows, rows)
    try:
        graph.build_inputs(_IBP, [box], program.consts)
        graph.forward_propagation(_IBP)
        (rows,) = graph.backward_propagation(_TRANSFORMS[method], _only, rows)
    except Exception as error:  # of any kind: jax_verify checks little
        raise NotImplementedError(
            f'jax_verify fails ({error}): it bounds chains of convolution, dense layer, reshape, '
            "relu, and + - * / of arrays; engine='native' bounds more"
        ) from error
    return _crown.concretize_backward_bound(rows, box).lower
