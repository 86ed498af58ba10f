"""The masked network under evaluation: variables -> logits function."""

from collections.abc import Callable
from functools import cache

from flax import linen
from jax.tree_util import Partial

from robustprune_jax.pruning import Choice, choose_masks, effective_params


def dense(variables: dict) -> dict:
    """Returns the collections that the module reads, the masks multiplied in."""
    network = {'params': effective_params(variables)}
    if 'batch_stats' in variables:
        network['batch_stats'] = variables['batch_stats']
    return network


def with_masks(variables: dict, choice: Choice | None) -> dict:
    """Returns `variables` with the masks that their scores choose; as they are when it is None."""
    return variables if choice is None else {**variables, 'masks': choose_masks(choice, variables)}


@cache
def _eval_forward(module: linen.Module) -> Callable:
    return lambda variables, images: module.apply(variables, images, train=False)


def logits_fn(module: linen.Module, variables: dict) -> Partial:
    """Returns the eval-mode network with its masks multiplied in: images -> logits.

    A pytree, to be passed to attacks and bounds; networks of one module share compiled code.
    """
    return Partial(_eval_forward(module), dense(variables))
