"""The interpreter of jaxprs under bounds and export: each brings a rule for one equation.

It enters nested programs (jit, custom derivatives, remat), and of lax.platform_dependent takes the
default: all branches compute the same.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import flax
import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.source_info_util import summarize

# Multiply what depends on the image by weights.
PRODUCTS = ('dot_general', 'conv_general_dilated')
# Move entries.
MOVES = {
    'broadcast_in_dim', 'concatenate', 'copy', 'dynamic_slice', 'expand_dims', 'gather', 'pad',
    'reshape', 'rev', 'slice', 'split', 'squeeze', 'stack', 'transpose', 'unstack',
}  # fmt: skip
# Let an entry depend on its neighbours, though their outputs are of their inputs' shapes.
_MIXES = {
    'cholesky', 'cumlogsumexp', 'cummax', 'cummin', 'cumprod', 'cumsum', 'fft', 'scan', 'sort',
    'triangular_solve', 'while',
}  # fmt: skip
# primitive -> the parameter that is the program inside it
NESTED = {
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'checkpoint': 'jaxpr',
    'remat2': 'jaxpr',
}

_PLATFORM = object()  # the number of the platform that the program runs on
_LIBRARIES = tuple(os.path.dirname(library.__file__) + os.sep for library in (flax, jax))


@cache
def eval_program(module: flax.linen.Module, image_shape: tuple[int, ...]) -> tuple[dict, Any]:
    """Returns the shapes of a network's variables, and its program of them and one image, in eval
    mode. image_shape: (H, W, C)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
    network = jax.eval_shape(module.init, jax.random.key(0), images)
    return network, jax.make_jaxpr(partial(module.apply, train=False))(network, images)


def interpret(
    program: Jaxpr,
    args: Sequence,
    rule: Callable[[JaxprEqn, list, tuple[JaxprEqn, ...]], Sequence],
    constant: Callable[[Any], Any] = lambda value: value,
    callers: tuple[JaxprEqn, ...] = (),
) -> list:
    """Returns the outputs of a program, closed or without constants, for values of any kind.

    rule(equation, inputs, nested) -> its outputs; nested: the equations that it lies in, outermost
    first, and itself. constant: an array of the program -> the value that stands for it.
    """
    jaxpr, consts = getattr(program, 'jaxpr', program), getattr(program, 'consts', ())
    variables = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*map(constant, consts), *args], strict=True))

    def read(atom):
        if isinstance(atom, Literal):
            return constant(np.asarray(atom.val, atom.aval.dtype))
        return values[atom]

    for eqn in jaxpr.eqns:
        name, inputs, nested = eqn.primitive.name, [read(x) for x in eqn.invars], (*callers, eqn)
        if name in NESTED:
            outputs = interpret(eqn.params[NESTED[name]], inputs, rule, constant, nested)
        elif name == 'platform_index':
            outputs = [_PLATFORM]
        elif name == 'cond' and inputs[0] is _PLATFORM:
            outputs = interpret(eqn.params['branches'][-1], inputs[1:], rule, constant, nested)
        else:
            outputs = rule(eqn, inputs, nested)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def computed(eqn: JaxprEqn, values: Sequence, **params) -> list:
    """Returns the outputs of an equation for arrays; params: in place of its own."""
    outputs = eqn.primitive.bind(*values, **{**eqn.params, **params})
    return outputs if eqn.primitive.multiple_results else [outputs]


def moved(eqn: JaxprEqn, inputs: Sequence, kind: type, absent: float) -> list:
    """Returns what one of MOVES makes of the entries of those inputs that are of a kind.

    The others', such as padding, are `absent`, but where they say what goes where.
    """
    data = {'gather': 1, 'dynamic_slice': 1}.get(eqn.primitive.name, len(inputs))
    dtype = next(x.entries.dtype for x in inputs if isinstance(x, kind))
    values = [
        x.entries
        if isinstance(x, kind)
        else np.full(atom.aval.shape, absent, dtype)
        if i < data
        else x
        for i, (x, atom) in enumerate(zip(inputs, eqn.invars, strict=True))
    ]
    return computed(eqn, values)


def goes_by_entry(eqn: JaxprEqn, inputs: Sequence[jax.Array]) -> bool:
    """Whether an entry of the output depends on those of the inputs at its own place only."""
    shape = eqn.outvars[0].aval.shape
    fit = (
        x.ndim in (0, len(shape)) and np.broadcast_shapes(x.shape, shape) == shape for x in inputs
    )
    return eqn.primitive.name not in _MIXES and all(fit)


def place(nested: Sequence[JaxprEqn]) -> str:
    """Returns where the model does what the innermost equation says: 'FILE:LINE:COLUMN (function)'.

    A line of the model's own, not of the layers it is made of. jax keeps of a nested program only
    its own part of the stack, often nothing of the model.
    """
    for eqn in reversed(nested):
        for frame in reversed(summarize(eqn.source_info, num_frames=99).splitlines()):
            if frame and not frame.startswith(_LIBRARIES):
                return frame
    return 'an unknown line'
