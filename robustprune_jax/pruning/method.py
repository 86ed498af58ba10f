"""Pruning methods, each a combination of four things:

    method  criterion        learned  allocation  structure
    hydra   scaled           yes      global      weights    Sehwag et al. 2020, there uniform
    lwm     scaled           no       global      weights    least weight magnitude, the baseline
    snip    snip             no       uniform     weights    Lee et al. 2019, layer by layer
    grasp   grasp            no       global      weights    Wang et al. 2020
    random  kaiming_uniform  no       uniform     weights    a mask that is drawn
    harp    scaled           yes      learned     weights    Zhao & Wressnegger 2023

A learned method has a phase in which the training objective moves its scores; the others fine-tune
under the mask that the criterion chooses at once. Add one with an entry of METHODS, and where it
brings something new, an entry of CRITERIA, ALLOCATIONS or STRUCTURES.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.pruning.allocation import ALLOCATIONS, Allocation, Budget
from robustprune_jax.pruning.masks import masks_within
from robustprune_jax.pruning.rates import Rates, exact_counts, relaxed_masks
from robustprune_jax.runtime.registry import lookup


class Method(NamedTuple):
    """title: what reports print; criterion, allocation, structure: names of their registries;
    learned: whether the objective's gradients move the scores, in a prune phase."""

    title: str
    criterion: str = 'scaled'
    learned: bool = False
    allocation: str = 'uniform'
    structure: str = 'weights'


METHODS: dict[str, Method] = {
    'hydra': Method('HYDRA', learned=True, allocation='global'),
    'lwm': Method('LWM', allocation='global'),
    'snip': Method('SNIP', criterion='snip'),
    'grasp': Method('GraSP', criterion='grasp', allocation='global'),
    'harp': Method('HARP', learned=True, allocation='learned'),
    'random': Method('random mask', criterion='kaiming_uniform'),
}


class Choice(NamedTuple):
    """How masks follow from scores. rates: how the kept fractions train, with allocation
    'learned'."""

    budget: Budget
    allocation: str = 'uniform'
    structure: str = 'weights'
    rates: Rates | None = None


def configured(name: str, axes: Mapping[str, str]) -> Method:
    """Returns the method of that name, with those of its axes replaced that are not ''.

    axes: criterion, allocation and structure, as config.pruning has them. Raises ValueError on an
    unknown name, with the nearest one.
    """
    given = {axis: axes[axis] for axis in ('criterion', 'allocation', 'structure') if axes[axis]}
    return lookup(METHODS, name, 'method')._replace(**given)


def training_masks(choice: Choice, variables: dict) -> dict:
    """Returns the masks that the scores (and rates) of `variables` choose, with the gradients to
    them; those of learned rates may be off the budget."""
    if choice.rates:
        return relaxed_masks(variables, choice.budget, choice.rates)
    return _masks(choice, variables, training=True)


def choose_masks(choice: Choice, variables: dict) -> dict:
    """Returns the masks that the scores (and rates) of `variables` choose, exactly on budget.

    Not inside jit.
    """
    counts = None
    if choice.rates:
        counts = exact_counts(variables, choice.budget)
        counts = {path: jnp.int32(count) for path, count in counts.items()}
    return _masks_on_device(choice, variables, counts)


def _masks(choice, variables, counts=None, training=False):
    if counts:
        allocation = Allocation(lambda scores, budget: counts)
    else:
        allocation = lookup(ALLOCATIONS, choice.allocation, 'allocation')
    scores, budget, structure = variables['scores'], choice.budget, choice.structure
    return masks_within(scores, budget, allocation, structure, training)


_masks_on_device = jax.jit(_masks, static_argnums=0)
