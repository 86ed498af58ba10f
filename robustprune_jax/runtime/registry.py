"""Names that users write, in configs, flags and arguments, and what they stand for."""

import difflib


def lookup(registry, name: str, what: str):
    """Returns registry[name]; raises ValueError with the nearest name, or all, if it is absent."""
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, list(registry), n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else f'one of {", ".join(registry)}'
    raise ValueError(f'unknown {what} {name!r}: {hint}')
