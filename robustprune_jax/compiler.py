"""How programs that run networks are compiled."""

from collections.abc import Callable
from functools import cache, partial, wraps

import jax

# XLA's convolutions on CPU are up to 1.5 times slower without it, their weight gradients 2 to 4.
CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}


def options() -> dict | None:
    """Returns the compiler options of the default backend, for `jax.jit`."""
    return CPU_OPTIONS if jax.default_backend() == 'cpu' else None


def jit(function: Callable | None = None, **settings) -> Callable:
    """Decorates as `jax.jit` does, with `options`; not for use inside another jit.

    The backend is asked for at the first call: at import it could not be chosen any more.
    """
    if function is None:
        return partial(jit, **settings)
    compiled = cache(lambda: jax.jit(function, compiler_options=options(), **settings))

    @wraps(function)
    def call(*args, **kwargs):
        return compiled()(*args, **kwargs)

    return call
