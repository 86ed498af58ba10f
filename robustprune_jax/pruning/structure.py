"""What is kept or removed as one: single weights, n of every m, or channels.

A structure is a function of (scores by path, allocation, budget, training) that returns 0/1 masks
by path, with the gradients of the scores. training: for a step of the prune phase.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.pruning.allocation import Allocation, Budget, least
from robustprune_jax.pruning.channels import channels
from robustprune_jax.pruning.top_k import first_of_each, straight_through, top_k_mask


def weights(scores: dict, allocation: Allocation, budget: Budget, training: bool) -> dict:
    """Returns masks that keep as many weights of largest |score| in each leaf as the allocation
    says, or, where it says one number, of largest rank(|score|) in all, and `least` of each leaf.

    Of the budget's head every output keeps its own largest, per_class of them, or as many as the
    leaf has for each.
    """
    chosen = _largest(jax.lax.stop_gradient(scores), allocation, budget)
    return {path: straight_through(leaf, chosen[path]) for path, leaf in scores.items()}


def _largest(scores, allocation, budget):
    kept = allocation.kept(scores, budget)
    magnitudes = {path: jnp.abs(leaf) for path, leaf in scores.items()}
    if isinstance(kept, dict):
        if budget.head in kept:
            classes = scores[budget.head].shape[-1]
            every = budget.per_class
            if isinstance(kept[budget.head], int):
                every = min(every, kept[budget.head] // classes)
            magnitudes |= {budget.head: first_of_each(magnitudes[budget.head], every)}
        return {path: top_k_mask(leaf, kept[path]) for path, leaf in magnitudes.items()}
    for path, floor in least(scores, budget).items():
        every = budget.per_class if path == budget.head else 0
        ranked = first_of_each(allocation.rank(magnitudes[path], kept), every)
        magnitudes[path] = first_of_each(ranked.reshape(-1, 1), floor).reshape(ranked.shape)
    whole = top_k_mask(jnp.concatenate([leaf.ravel() for leaf in magnitudes.values()]), kept)
    ends = np.cumsum([leaf.size for leaf in magnitudes.values()])[:-1]
    parts = zip(magnitudes, jnp.split(whole, ends), strict=True)
    return {path: part.reshape(scores[path].shape) for path, part in parts}


def n_of_m(scores: dict, allocation: Allocation, budget: Budget, training: bool) -> dict:
    """Returns masks that keep, of every m consecutive inputs of an output, the n of largest
    |score|, ties to the lower index; such as 2:4, which GPUs multiply twice as fast.

    The density is n / m, whatever the allocation. Raises ValueError on a layer whose inputs m does
    not divide, by name; with budget.undivided 'dense' it keeps all its weights.
    """
    masks = {}
    for path, leaf in scores.items():
        inputs = leaf.shape[-2]
        if inputs % budget.m == 0:
            magnitudes = jnp.abs(jax.lax.stop_gradient(leaf))
            masks[path] = straight_through(leaf, _n_of_m(magnitudes, budget.n, budget.m))
        elif budget.undivided == 'dense':
            masks[path] = straight_through(leaf, jnp.ones_like(leaf))
        else:
            raise ValueError(
                f'{"/".join(path)} has {inputs} inputs, which {budget.m} does not divide: '
                'pruning.undivided=dense leaves such layers out'
            )
    return masks


def _n_of_m(magnitudes, n, m):
    groups = magnitudes.reshape(*magnitudes.shape[:-2], -1, m, magnitudes.shape[-1])
    one, other = jnp.expand_dims(groups, -2), jnp.expand_dims(groups, -3)  # [..., i, j, out]
    i, j = jnp.arange(m)[:, None, None], jnp.arange(m)[None, :, None]
    before = (other > one) | ((other == one) & (j < i))
    mask = jnp.sum(before, axis=-2) < n
    return mask.reshape(magnitudes.shape).astype(magnitudes.dtype)


STRUCTURES: dict[str, Callable[[dict, Allocation, Budget, bool], dict]] = {
    'weights': weights,
    'n_of_m': n_of_m,
    'channels': channels,
}
