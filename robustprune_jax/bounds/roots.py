"""alpha-CROWN over the units of a network, on the whole ball: of its margins and of the units."""

import jax
import numpy as np

from robustprune_jax.bounds import splits
from robustprune_jax.bounds.linear import Ball
from robustprune_jax.bounds.units import Rows, Units

RATES = (0.1, 0.0)  # of alpha; nothing is split, so beta says nothing
ITERATIONS, INSIDE_ITERATIONS = 30, 10
BATCHES = (16, 128)  # rows at once: those of branching's halves, for the same programs


def bounded(
    units: Units, sizes: tuple[int, ...], rows: Rows, ball: Ball, iterations: int = ITERATIONS
) -> tuple[splits.Bound, splits.Domains]:
    """Returns the bounds of all rows [S], and the slopes of each, on the host."""
    count = len(rows.bias)
    size = next((b for b in BATCHES if b >= count), BATCHES[-1])
    whole, found = splits.whole(units, size), []
    for first in range(0, count, size):
        part = rows.at(slice(first, first + size)).filled(size)
        found.append(
            jax.device_get(splits.climb(units, sizes, part, whole, ball, RATES, iterations))
        )
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)


def tightened(units: Units, sizes: tuple[int, ...], ball: Ball) -> Units:
    """Returns the units with bounds by alpha-CROWN, layer after layer, each over the ones before.

    Those of the first layer, affine in the image, are exact as they are.
    """
    start = 0
    for size in sizes:
        layer = np.arange(start, start + size)
        start += size
        layer = layer[(units.lower[layer] < 0) & (units.upper[layer] > 0)]
        if start == size or not len(layer):
            continue
        z = units.rows.at(layer)
        both = Rows(*(np.concatenate([part, -part]) for part in z))
        both = both._replace(error=abs(both.error))
        found, _ = bounded(units, sizes, both, ball, INSIDE_ITERATIONS)
        low, high = np.split(found.lower, 2)
        lower, upper = units.lower.copy(), units.upper.copy()
        lower[layer], upper[layer] = (
            np.maximum(lower[layer], low),
            np.minimum(upper[layer], -high),
        )
        units = units._replace(lower=lower, upper=upper)
    return units
