"""Pruning methods, each a combination of four things:

    method  criterion        learned  allocation  structure
    hydra   scaled           yes      uniform     weights    Sehwag et al. 2020
    lwm     scaled           no       uniform     weights    least weight magnitude, the baseline
    snip    snip             no       uniform     weights    Lee et al. 2019, layer by layer
    random  kaiming_uniform  no       uniform     weights    a mask that is drawn

A learned method has a phase in which the training objective moves its scores; the others fine-tune
under the mask that the criterion chooses at once. Add one with an entry of METHODS, and where it
brings something new, an entry of CRITERIA, ALLOCATIONS or STRUCTURES.
"""

from collections.abc import Mapping
from typing import NamedTuple

from robustprune_jax.pruning.masks import topk_masks
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
    'hydra': Method('HYDRA', learned=True),
    'lwm': Method('LWM'),
    'snip': Method('SNIP', criterion='snip'),
    'random': Method('random mask', criterion='kaiming_uniform'),
}


class Choice(NamedTuple):
    """How masks follow from scores: the keyword arguments of topk_masks."""

    density: float
    allocation: str = 'uniform'
    structure: str = 'weights'
    power: float = 0.5
    head: tuple[str, ...] | None = None
    per_class: int = 0


def configured(name: str, axes: Mapping[str, str]) -> Method:
    """Returns the method of that name, with those of its axes replaced that are not ''.

    axes: criterion, allocation and structure, as config.pruning has them. Raises ValueError on an
    unknown name, with the nearest one.
    """
    given = {axis: axes[axis] for axis in ('criterion', 'allocation', 'structure') if axes[axis]}
    return lookup(METHODS, name, 'method')._replace(**given)


def choose_masks(choice: Choice, variables: dict) -> dict:
    """Returns the masks that the scores of `variables` choose, straight-through."""
    return topk_masks(variables['scores'], **choice._asdict())
