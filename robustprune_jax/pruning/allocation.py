"""How many weights each layer keeps of a network's budget.

A layer l of n_l weights keeps a number proportional to

    uniform   n_l                            of each layer by itself (HYDRA)
    erk       the sum of its kernel's sizes  Erdos-Renyi-Kernel (Evci et al. 2020)
    igq       n_l / (F n_l + 1)              F from the budget (Chen et al. 2022, FlyingBird)
    power     n_l ** power                   power 1 is uniform, 0 as many in each layer

or what one threshold over the whole network leaves of its scores: `global`, and `lamp`, with
score ** 2 / sum of the squares of the layer's scores that are at least as large (Lee et al. 2021).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.graph.coupling import Coupling


class Budget(NamedTuple):
    """What is to be shared out.

    density: the kept fraction of all weights, in (0, 1]. power: of the allocation `power`.
    head: the path of the last layer's kernel, where it is to keep per_class weights or more of
    each of its outputs, so that no class is cut off. minimum: what every layer keeps at least, as a
    part of what it would keep at the density by itself. n, m, undivided: of the structure `n_of_m`,
    whose density is n / m; layers that m does not divide are an error ('stop') or stay whole
    ('dense'). coupling, counts: of the structure `channels`, how units depend on each other, and
    what density is the fraction of: 'weights' or 'multiply_adds'.
    """

    density: float
    power: float = 0.5
    head: tuple[str, ...] | None = None
    per_class: int = 0
    minimum: float = 0.0
    n: int = 2
    m: int = 4
    undivided: str = 'stop'
    coupling: Coupling | None = None
    counts: str = 'weights'


class Allocation(NamedTuple):
    """kept: (scores by path, budget) -> how many weights each leaf keeps, by path, or all leaves
    together; rank: what leaves are then compared by, of their |scores| and that number."""

    kept: Callable[[dict, Budget], dict | int]
    rank: Callable[[jax.Array, int], jax.Array] = lambda magnitudes, kept: magnitudes


def kept_count(size: int, density: float) -> int:
    """Number of weights kept of `size` at `density` in (0, 1], by the original's rule.

    The fraction is truncated in Python floats, never rounded and never float32.
    """
    if not 0 < density <= 1:
        raise ValueError(f'density is {density}: expected the kept fraction, above 0 and at most 1')
    return size - int((1 - density) * size)


def uniform(scores: dict, budget: Budget) -> dict:
    """Returns the same fraction of every layer, as HYDRA: `kept_count` of its size."""
    return {path: kept_count(leaf.size, budget.density) for path, leaf in scores.items()}


def total(scores: dict, budget: Budget) -> int:
    """Returns `kept_count` of the whole network, for one threshold over all layers.

    Raises ValueError where that is less than one weight of each layer, and those of the head.
    """
    kept = kept_count(sum(leaf.size for leaf in scores.values()), budget.density)
    needed = sum(least(scores, budget).values())
    if kept < needed:
        raise ValueError(
            f'density {budget.density:g} keeps {kept} weights, and {needed} are the least that '
            'reach every layer and class: a higher density, or pruning.minimum or per_class=0'
        )
    return kept


def _by_size(amount: Callable[[jax.Array, float, Budget], float]) -> Allocation:
    """An allocation from shapes alone; amount: (leaf, scale, budget) -> what it keeps, growing
    with the scale."""
    return Allocation(
        lambda scores, budget: fitted(
            lambda path, scale: amount(scores[path], scale, budget), scores, budget
        )
    )


def fitted(amount: Callable[[tuple, float], float], scores: dict, budget: Budget) -> dict:
    """Returns how many weights each leaf keeps, by path, `total` together.

    amount: (path, scale) -> number, which grows with the scale from about 0 without limit; a leaf
    keeps that, but its `least` number at least and all its weights at most. Those with the largest
    remainders are rounded up, among equals the first.
    """
    kept, floors = total(scores, budget), least(scores, budget)

    def amounts(scale):
        return {
            path: min(max(amount(path, scale), floors[path]), leaf.size)
            for path, leaf in scores.items()
        }

    low, high = -200.0, 200.0  # of the scale's logarithm
    for _ in range(100):
        middle = (low + high) / 2
        below = sum(amounts(math.exp(middle)).values()) < kept
        low, high = (middle, high) if below else (low, middle)
    found = amounts(math.exp(low))
    whole = {path: math.floor(number) for path, number in found.items()}
    by_remainder = sorted(found, key=lambda path: whole[path] - found[path])
    for path in by_remainder[: kept - sum(whole.values())]:
        whole[path] += 1
    return whole


def least(scores: dict, budget: Budget) -> dict[tuple[str, ...], int]:
    """Returns the fewest weights that each leaf is to keep: one, its minimum, and of the head's
    per class."""
    part = budget.minimum * budget.density
    floors = {path: max(int(part * leaf.size), 1) for path, leaf in scores.items()}
    if budget.head in scores:
        head = scores[budget.head]
        of_classes = min(budget.per_class * head.shape[-1], head.size)
        floors[budget.head] = max(of_classes, floors[budget.head])
    return floors


def lamp(magnitudes: jax.Array, kept: int) -> jax.Array:
    """Returns LAMP's scores of a layer: m ** 2 / sum of all m ** 2 that are at least as large.

    Only of the `kept` largest, 0 for the others: no layer has more that stay, and to sort all takes
    as long as a step of a small network.
    """
    largest, places = jax.lax.top_k(magnitudes.ravel(), min(kept, magnitudes.size))
    squares = largest**2
    ranked = squares / jnp.maximum(jnp.cumsum(squares), jnp.finfo(squares.dtype).tiny)
    scores = jnp.zeros(magnitudes.size, squares.dtype).at[places].set(ranked)
    return scores.reshape(magnitudes.shape)


ALLOCATIONS: dict[str, Allocation] = {
    'uniform': Allocation(uniform),
    'erk': _by_size(lambda leaf, scale, budget: scale * sum(leaf.shape)),
    'igq': _by_size(lambda leaf, scale, budget: leaf.size / (leaf.size / scale + 1)),
    'power': _by_size(lambda leaf, scale, budget: scale * leaf.size**budget.power),
    'global': Allocation(total),
    'lamp': Allocation(total, lamp),
}
