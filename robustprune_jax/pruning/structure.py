"""What is kept or removed as one: single weights, or n of every m."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.pruning.allocation import Budget


def top_k_mask(magnitudes: jax.Array, k: int | jax.Array) -> jax.Array:
    """Returns the 0/1 mask of the k largest of `magnitudes` (>= 0), the lower flat index first.

    The bit patterns of non-negative floats are ordered as integers, so the k-th largest value is
    found by bisection on its bits: one counting pass per bit, whatever the density (`lax.top_k`
    slows down as k grows, a sort is ten times dearer), and exact where values are equal.
    """
    bits = jnp.finfo(magnitudes.dtype).bits
    patterns = jax.lax.bitcast_convert_type(magnitudes.ravel(), jnp.dtype(f'int{bits}'))

    def set_bit(i, threshold):
        candidate = threshold | (jnp.ones((), patterns.dtype) << (bits - 2 - i))
        return jnp.where(jnp.sum(patterns >= candidate) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, bits - 1, set_bit, jnp.zeros((), patterns.dtype))
    above, equal = patterns > threshold, patterns == threshold
    room = k - jnp.sum(above)

    def first(equal):
        return equal & (jnp.cumsum(equal) <= room)

    def where_needed(equal):
        # On CPU the running sum takes as long as the bisection, and seldom have equals to compete.
        # Elsewhere a condition would make the host wait.
        return jax.lax.cond(jnp.sum(equal) == room, lambda equal: equal, first, equal)

    mask = above | jax.lax.platform_dependent(equal, cpu=where_needed, default=first)
    return mask.reshape(magnitudes.shape).astype(magnitudes.dtype)


@jax.custom_jvp
def straight_through(score: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mask, with the score's gradient: identity in the mask, then through |score|."""
    return mask


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # Not the derivative of jnp.abs: at 0 that is 1, and the original's sign is 0.
    return primals[1], jnp.sign(primals[0]) * tangents[0]


def weights(scores: dict, kept: dict | int, budget: Budget, rank: Callable | None) -> dict:
    """Returns masks that keep the `kept` weights of largest |score| in each leaf, or, where that is
    one number, of largest rank(|score|) in all, one of each leaf at least.

    scores, kept and the masks: by path. Of the budget's head every output keeps its own largest,
    per_class of them, or as many as the leaf has for each.
    """
    magnitudes = {path: jnp.abs(leaf) for path, leaf in scores.items()}
    if isinstance(kept, dict):
        if budget.head in kept:
            classes = scores[budget.head].shape[-1]
            every = budget.per_class
            if isinstance(kept[budget.head], int):
                every = min(every, kept[budget.head] // classes)
            magnitudes |= {budget.head: first_of_each(magnitudes[budget.head], every)}
        return {path: top_k_mask(leaf, kept[path]) for path, leaf in magnitudes.items()}
    for path, leaf in magnitudes.items():
        ranked = first_of_each(rank(leaf).reshape(-1, 1), 1).reshape(leaf.shape)
        every = budget.per_class if path == budget.head else 0
        magnitudes[path] = first_of_each(ranked, every)
    whole = top_k_mask(jnp.concatenate([leaf.ravel() for leaf in magnitudes.values()]), kept)
    ends = np.cumsum([leaf.size for leaf in magnitudes.values()])[:-1]
    parts = zip(magnitudes, jnp.split(whole, ends), strict=True)
    return {path: part.reshape(scores[path].shape) for path, part in parts}


def first_of_each(magnitudes: jax.Array, every: int) -> jax.Array:
    """Returns the magnitudes, the `every` largest of each output (the last axis) infinite."""
    if not every:
        return magnitudes
    columns = magnitudes.reshape(-1, magnitudes.shape[-1])
    rows = jax.lax.top_k(columns.T, min(every, len(columns)))[1].T
    columns = columns.at[rows, jnp.arange(columns.shape[1])].set(jnp.inf)
    return columns.reshape(magnitudes.shape)


def n_of_m(scores: dict, kept: dict | int, budget: Budget, rank: Callable | None) -> dict:
    """Returns masks that keep, of every m consecutive inputs of an output, the n of largest
    |score|, ties to the lower index; such as 2:4, which GPUs multiply twice as fast.

    The density is n / m, whatever `kept` says. Raises ValueError on a layer whose inputs m does not
    divide, by name; with budget.undivided 'dense' it keeps all its weights.
    """
    masks = {}
    for path, leaf in scores.items():
        inputs = leaf.shape[-2]
        if inputs % budget.m == 0:
            masks[path] = _n_of_m(jnp.abs(leaf), budget.n, budget.m)
        elif budget.undivided == 'dense':
            masks[path] = jnp.ones_like(leaf)
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


# name -> (scores, kept weights, budget, rank) -> 0/1 masks, all by path
STRUCTURES: dict[str, Callable[[dict, dict | int, Budget, Callable | None], dict]] = {
    'weights': weights,
    'n_of_m': n_of_m,
}
