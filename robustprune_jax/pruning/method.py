"""Pruning methods, each a combination of five things:

    method      criterion        learned  allocation  dynamic
    hydra       scaled           yes      global                Sehwag et al. 2020, there uniform
    lwm         scaled           no       global                least weight magnitude, the baseline
    snip        snip             no       uniform               Lee et al. 2019, layer by layer
    grasp       grasp            no       global                Wang et al. 2020
    random      kaiming_uniform  no       uniform               a mask that is drawn
    harp        scaled           yes      learned               Zhao & Wressnegger 2023
    flyingbird  kaiming_uniform  no       igq         random    Chen et al. 2022
    rigl        kaiming_uniform  no       erk         gradient  Evci et al. 2020
    set         kaiming_uniform  no       erk         random    Mocanu et al. 2018

and a structure, of all of them `weights`. A learned method has a phase in which the training
objective moves its scores; the others fine-tune under the mask that the criterion chooses at once,
and that of a dynamic one moves on meanwhile. Add one with an entry of METHODS, and where it brings
something new, an entry of CRITERIA, ALLOCATIONS, STRUCTURES or GROWTHS.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.pruning.allocation import ALLOCATIONS, Allocation, Budget
from robustprune_jax.pruning.dynamic import Dynamic
from robustprune_jax.pruning.masks import masks_within
from robustprune_jax.pruning.rates import Rates, exact_counts, relaxed_masks
from robustprune_jax.runtime.registry import lookup


class Method(NamedTuple):
    """title: what reports print; criterion, allocation, structure: names of their registries;
    learned: whether the objective's gradients move the scores, in a prune phase; dynamic: how masks
    move in finetune, None where they stay."""

    title: str
    criterion: str = 'scaled'
    learned: bool = False
    allocation: str = 'uniform'
    structure: str = 'weights'
    dynamic: Dynamic | None = None


METHODS: dict[str, Method] = {
    'hydra': Method('HYDRA', learned=True, allocation='global'),
    'lwm': Method('LWM', allocation='global'),
    'snip': Method('SNIP', criterion='snip'),
    'grasp': Method('GraSP', criterion='grasp', allocation='global'),
    'harp': Method('HARP', learned=True, allocation='learned'),
    'random': Method('random mask', criterion='kaiming_uniform'),
    # Intervals of 900, 100 steps in their papers, of CIFAR-10's 391 an epoch.
    'flyingbird': Method(
        'FlyingBird',
        criterion='kaiming_uniform',
        allocation='igq',
        dynamic=Dynamic('random', interval=2.3, fraction=0.5, final=0.01),
    ),
    'rigl': Method(
        'RigL',
        criterion='kaiming_uniform',
        allocation='erk',
        dynamic=Dynamic('gradient', interval=0.25, fraction=0.3, until=0.75),
    ),
    'set': Method(
        'SET',
        criterion='kaiming_uniform',
        allocation='erk',
        dynamic=Dynamic('random', interval=1.0, fraction=0.3, final=1.0),
    ),
}


class Choice(NamedTuple):
    """How masks follow from scores. rates: how the kept fractions train, with allocation
    'learned'. dynamic: how the masks then move, if they do."""

    budget: Budget
    allocation: str = 'uniform'
    structure: str = 'weights'
    rates: Rates | None = None
    dynamic: Dynamic | None = None


def configured(name: str, axes: Mapping) -> Method:
    """Returns the method of that name, with those of its axes replaced that are not '' or 0.

    axes: criterion, allocation, structure and dynamic, as config.pruning has them. Raises
    ValueError on an unknown name, with the nearest one.
    """
    given = {axis: axes[axis] for axis in ('criterion', 'allocation', 'structure') if axes[axis]}
    method = lookup(METHODS, name, 'method')._replace(**given)
    if method.dynamic is None:
        return method
    moves = {field: value for field, value in axes['dynamic'].items() if value}
    return method._replace(dynamic=method.dynamic._replace(**moves))


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
