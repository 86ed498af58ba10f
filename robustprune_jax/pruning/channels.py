"""Whole channels, kept or removed with all that depends on them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.graph.coupling import Coupling
from robustprune_jax.pruning.allocation import Allocation, Budget, kept_count
from robustprune_jax.pruning.top_k import first_of_each, top_k_mask


def channels(scores: dict, allocation: Allocation, budget: Budget, training: bool) -> dict:
    """Returns masks that keep units of budget.coupling: of each layer those of largest worth, the
    Euclidean norm of the scores of the weights that make one; where several kernels do, the root
    mean square of theirs. (Of scaled scores norms compare over layers, sums and means do not.)

    The allocation shares units out over layers, of which as many stay as the budget has room for,
    in kept weights or in their multiply-adds, one of each layer at least. A weight stays where what
    it makes and what it reads does. In training the weights that make a removed unit are left
    alone: nothing reads it, so the logits are the same, and its gradient is what it would be worth.
    Raises ValueError where one unit of each layer is more than the budget, or no unit can go.
    """
    coupling = budget.coupling
    if coupling is None:
        raise ValueError(
            "structure 'channels' needs the network's graph: pass coupling=coupled_units(module, "
            'image_shape)'
        )
    if not len(coupling.group):
        raise ValueError('no channel of the network can go: pruning.structure=weights')
    if unused := ['/'.join(path) for path in scores if path not in coupling.made]:
        raise ValueError(f'the network does not multiply by {", ".join(unused)}')
    kept = jnp.append(_kept_units(scores, allocation, budget), 1)  # the last is that of -1
    masks = {}
    for path, leaf in scores.items():
        masks[path] = jnp.ones_like(leaf)
        if path in coupling.read:
            masks[path] *= kept[coupling.read[path]][:, None]
        if not training:
            masks[path] *= kept[coupling.made[path]]
    return masks


def _kept_units(scores, allocation, budget):
    """1 for each unit that stays, else 0, with the gradient of the unit's worth."""
    coupling, costs = budget.coupling, _costs(scores, budget)
    straight = _worth(scores, coupling)
    worth = jax.lax.stop_gradient(straight)
    layers = _layers(coupling)
    of_layers = {(str(layer),): worth[units] for layer, units in enumerate(layers)}
    if costs.of(costs.first(layers, [1] * len(layers))) > costs.limit:
        raise ValueError(
            f'density {budget.density:g} has room for {costs.limit} {budget.counts}, and one '
            'channel of each layer needs more: a higher density'
        )
    shared = isinstance(allocation.kept(of_layers, budget._replace(density=1.0)), dict)
    if shared:
        numbers = _numbers(of_layers, allocation, budget, layers, costs)
        ranks = [top_k_mask(leaf, k) for leaf, k in zip(of_layers.values(), numbers, strict=True)]
        kept = jnp.zeros_like(worth).at[np.concatenate(layers)].set(jnp.concatenate(ranks))
    else:
        kept = _above_threshold(of_layers, allocation.rank, layers, costs)
    return kept + (straight - worth)


def _worth(scores: dict, coupling: Coupling) -> jax.Array:
    """The norm of a unit's scores, [units]."""
    squares, kernels = jnp.zeros(len(coupling.group)), np.zeros(len(coupling.group))
    for path, leaf in scores.items():
        made = coupling.made[path]
        units, per_output = made[made >= 0], jnp.sum(leaf.reshape(-1, len(made)) ** 2, axis=0)
        squares = squares.at[units].add(per_output[made >= 0])
        np.add.at(kernels, units, 1)
    # The root's derivative at 0 is infinite.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1) / kernels), 0)


def _layers(coupling: Coupling) -> list[np.ndarray]:
    """The numbers of each layer's units, those that most kernels use first."""
    used = np.concatenate([*coupling.made.values(), *coupling.read.values()])
    uses = np.bincount(used[used >= 0], minlength=len(coupling.group))
    order = np.argsort(-uses, kind='stable')
    return [order[coupling.group[order] == layer] for layer in np.unique(coupling.group)]


class _Costs(NamedTuple):
    """What units cost, and at most may: kernel k costs each[k] * (read[k] @ kept) * (made[k] @
    kept), where kept [units + 1] ends with the 1 of what always stays."""

    limit: int
    each: np.ndarray
    read: np.ndarray
    made: np.ndarray

    def of(self, kept):
        return (self.each * (self.read @ kept) * (self.made @ kept)).sum()

    def first(self, layers, numbers):
        """Keeps so many units of each layer, the dearest."""
        kept = np.zeros(self.read.shape[1])
        kept[-1] = 1
        for units, number in zip(layers, numbers, strict=True):
            kept[units[:number]] = 1
        return kept


def _costs(scores: dict, budget: Budget) -> _Costs:
    coupling, count = budget.coupling, len(budget.coupling.group) + 1
    each, read, made = [], [], []
    for path, leaf in scores.items():
        inputs, outputs = leaf.shape[-2:]
        places = coupling.positions[path] if budget.counts == 'multiply_adds' else 1
        each.append(leaf.size // (inputs * outputs) * places)
        always = np.full(inputs, -1)  # a grouped convolution's inputs go with its outputs
        read.append(np.bincount(coupling.read.get(path, always) % count, minlength=count))
        made.append(np.bincount(coupling.made[path] % count, minlength=count))
    costs = _Costs(0, *map(np.array, (each, read, made)))
    return costs._replace(limit=kept_count(int(costs.of(np.ones(count))), budget.density))


def _numbers(of_layers, allocation, budget, layers, costs):
    """How many units each layer keeps: what the allocation gives at the largest fraction of all
    units that fits; those that this leaves room for, in the first layers."""

    def numbers(density):
        return [*allocation.kept(of_layers, budget._replace(density=density)).values()]

    def fit(numbers):
        return costs.of(costs.first(layers, numbers)) <= costs.limit

    found, low, high = [1] * len(layers), len(layers) / sum(map(len, layers)), 2.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        tried = numbers(min(middle, 1.0))
        low, high, found = (middle, high, tried) if fit(tried) else (low, middle, found)
    more = numbers(min(high, 1.0))
    for layer in range(len(layers)):
        while found[layer] < more[layer]:
            found[layer] += 1
            if not fit(found):
                found[layer] -= 1
                break
    return found


def _above_threshold(of_layers, rank, layers, costs):
    """The units of largest rank(worth), and the largest of each layer, as many as fit."""
    ranked = [first_of_each(rank(leaf, leaf.size)[:, None], 1)[:, 0] for leaf in of_layers.values()]
    units = np.concatenate(layers)
    ranked = jnp.zeros(len(units)).at[units].set(jnp.concatenate(ranked))
    limit = costs.limit * (1 - 1e-6)  # costs are rounded to float32

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        fits = costs.of(jnp.append(top_k_mask(ranked, middle), 1)) <= limit
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    bounds = jnp.int32(len(layers)), jnp.int32(len(units))
    most, _ = jax.lax.fori_loop(0, len(units).bit_length(), halve, bounds)
    return top_k_mask(ranked, most)
