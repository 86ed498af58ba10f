"""Kept fractions that train with the scores: HARP (Zhao & Wressnegger, ICLR 2023).

Layer l of n_l weights keeps the fraction

    k_l = k_min + (1 - k_min) * sigmoid(r_l),  k_min = minimum * density,

and the loss has the penalty gamma * max(0, sum_l k_l n_l / (density * N) - 1), whose gamma grows
every epoch until the first that ends within the budget. While it trains, the masks may be off the
budget; those of a saved network keep it exactly.

What it trains is two Flax collections beside the scores: `rates`, {layer path: r_l}, and `budget`,
{'gamma', 'met'}.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robustprune_jax.pruning.allocation import ALLOCATIONS, Budget, fitted, least
from robustprune_jax.pruning.top_k import first_of_each, top_k_mask


class Rates(NamedTuple):
    """How kept fractions train.

    gamma: the penalty's weight in the first epoch, and by how much it grows in every other.
    gradient: a name of GRADIENTS. start: the allocation, one by size alone, that the fractions
    start from. The minimum is the budget's.
    """

    gamma: float = 0.2
    gradient: str = 'threshold'
    start: str = 'uniform'


def init_rates(scores: dict, budget: Budget, rates: Rates) -> dict:
    """Returns the collections `rates` and `budget`; a layer that starts at its least fraction
    starts a hundredth above it."""
    flat, minimum = flatten_dict(scores), budget.minimum * budget.density
    kept = ALLOCATIONS[rates.start].kept(flat, budget)
    logits = {}
    for path, leaf in flat.items():
        above = (kept[path] / leaf.size - minimum) / (1 - minimum)
        above = min(max(above, 0.01 * minimum), 0.999)
        logits[path] = jnp.float32(np.log(above / (1 - above)))
    return {
        'rates': unflatten_dict(logits),
        'budget': {'gamma': jnp.float32(rates.gamma), 'met': jnp.zeros((), bool)},
    }


def fractions(variables: dict, budget: Budget) -> dict:
    """Returns k_l by path."""
    minimum = budget.minimum * budget.density
    return {
        path: minimum + (1 - minimum) * jax.nn.sigmoid(rate)
        for path, rate in flatten_dict(variables['rates']).items()
    }


def excess(variables: dict, budget: Budget) -> jax.Array:
    """Returns sum_l k_l n_l / (density * N) - 1: by how much the kept weights are too many."""
    sizes = {path: leaf.size for path, leaf in flatten_dict(variables['scores']).items()}
    parts = fractions(variables, budget)
    kept = sum(parts[path] * size for path, size in sizes.items())
    return kept / (budget.density * sum(sizes.values())) - 1


def penalty(variables: dict, budget: Budget) -> jax.Array:
    """Returns gamma * max(0, excess), HARP's budget loss."""
    return variables['budget']['gamma'] * jax.nn.relu(excess(variables, budget))


def after_step(variables: dict, budget: Budget, rates: Rates, ends_epoch: jax.Array) -> dict:
    """Returns the variables with gamma grown at the end of an epoch, unless one met the budget."""
    gamma, met = variables['budget']['gamma'], variables['budget']['met']
    met = met | (ends_epoch & (excess(variables, budget) <= 0))
    gamma = jnp.where(ends_epoch & ~met, gamma + rates.gamma, gamma)
    return {**variables, 'budget': {'gamma': gamma, 'met': met}}


def relaxed_masks(variables: dict, budget: Budget, rates: Rates) -> dict:
    """Returns the masks of a training step, whose layers keep their fractions, on budget or not,
    with gradients to scores and rates."""
    flat, parts = flatten_dict(variables['scores']), fractions(variables, budget)
    floors = least(flat, budget)
    near = GRADIENTS[rates.gradient]
    masks = {}
    for path, score in flat.items():
        every = budget.per_class if path == budget.head else 0
        masks[path] = _relaxed(score, parts[path], floors[path], every, near)
    return unflatten_dict(masks)


def exact_counts(variables: dict, budget: Budget) -> dict[tuple[str, ...], int]:
    """Returns how many weights each leaf keeps, by path: of the fractions, scaled to the budget,
    the largest remainders rounded up. On the host."""
    flat = flatten_dict(variables['scores'])
    parts = jax.device_get(fractions(variables, budget))
    return fitted(lambda path, scale: scale * float(parts[path]) * flat[path].size, flat, budget)


def _near_threshold(magnitudes, kept):
    """n times the mean over the weights ranked from kept / 2 to 2 kept."""
    least_kept, most = jnp.maximum(kept // 2, 1), jnp.minimum(2 * kept, magnitudes.size)
    near = top_k_mask(magnitudes, most) - top_k_mask(magnitudes, least_kept)
    near = jnp.where(jnp.any(near > 0), near, 1)
    return magnitudes.size * near / jnp.sum(near)


# How dL/dk_l follows from dL/dmask: (|scores|, kept) -> the weights of a sum
GRADIENTS: dict[str, Callable] = {
    'threshold': _near_threshold,  # what a weight there is worth
    'sum': lambda magnitudes, kept: jnp.ones_like(magnitudes),  # the paper's
}


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _relaxed(score, part, floor, every, near):
    return top_k_mask(first_of_each(jnp.abs(score), every), _count(score, part, floor))


@_relaxed.defjvp
def _relaxed_jvp(floor, every, near, primals, tangents):
    (score, part), (score_dot, part_dot) = primals, tangents
    weights = near(jnp.abs(score), _count(score, part, floor))
    mask_dot = jnp.sign(score) * score_dot + weights * part_dot
    return _relaxed(score, part, floor, every, near), mask_dot


def _count(score, part, floor):
    kept = score.size - jnp.floor((1 - part) * score.size).astype(jnp.int32)
    return jnp.clip(kept, floor, score.size)
