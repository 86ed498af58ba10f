"""How many weights each layer keeps."""

from collections.abc import Callable

import jax


def kept_count(size: int, density: float) -> int:
    """Number of weights kept of `size` at `density` in (0, 1], by the original's rule.

    The fraction is truncated in Python floats, never rounded and never float32.
    """
    if not 0 < density <= 1:
        raise ValueError(f'density is {density}: expected the kept fraction, above 0 and at most 1')
    return size - int((1 - density) * size)


def uniform(scores: dict, density: float) -> dict:
    """Returns the same fraction of every layer, as HYDRA: `kept_count` of its size."""
    return jax.tree.map(lambda leaf: kept_count(leaf.size, density), scores)


# name -> (scores, density) -> how many weights each leaf keeps
ALLOCATIONS: dict[str, Callable[[dict, float], dict]] = {'uniform': uniform}
