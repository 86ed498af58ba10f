"""How programs that run networks are compiled: for which platform, with which options, how exactly.

with compiler.platform('tpu'):  # writes the TPU's programs on any machine
    ...
"""

from collections.abc import Callable
from functools import cache, partial, wraps

import jax

# XLA's convolutions on CPU are up to 1.5 times slower without it, their weight gradients 2 to 4.
CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}

# The platform that programs are written for, where it is not the default backend. jit's caches know
# of it: nothing written for one platform runs for another.
platform = jax.make_user_context(None)


def backend() -> str:
    """Returns 'cpu', 'gpu' or 'tpu': what programs are written for, the only place to ask."""
    return platform.value or jax.default_backend()


def options() -> dict | None:
    """Returns the compiler options of the backend, for `jax.jit`: those that this XLA knows."""
    if backend() != 'cpu':
        return None
    return {name: value for name, value in CPU_OPTIONS.items() if _is_known(name, value)}


@cache
def _is_known(name, value):
    # Experimental options come and go between versions of XLA, which says so when it compiles.
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(function: Callable | None = None, **settings) -> Callable:
    """Decorates as `jax.jit` does, with `options`; not for use inside another jit.

    The backend is asked for at the call: at import it could not be chosen any more.
    """
    if function is None:
        return partial(jit, **settings)

    @cache
    def compiled(backend):
        return jax.jit(function, compiler_options=options(), **settings)

    @wraps(function)
    def call(*args, **kwargs):
        return compiled(backend())(*args, **kwargs)

    return call


def precision(name: str) -> Callable[[Callable], Callable]:
    """Returns a decorator: products are as exact as jax's `name` says, '' the user's default."""

    def decorate(function):
        @wraps(function)
        def call(*args, **kwargs):
            with jax.default_matmul_precision(name):
                return function(*args, **kwargs)

        return call if name else function

    return decorate


# For what measures or proves: products of float32. jax's default are TF32 on recent GPUs and
# bfloat16 on TPUs, off by 1e-3.
full_precision = precision('highest')
