"""Branch and bound over the unstable relus of a network on one ball (Wang et al. 2021).

A queue of domains on the host, the worst first; the device halves and bounds batches of fixed
shapes. Each open margin has domains of its own, in the same queue and the same batches.
"""

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import jax
import numpy as np

from robustprune_jax.bounds import splits
from robustprune_jax.bounds.linear import Ball
from robustprune_jax.bounds.splits import Domains
from robustprune_jax.bounds.units import Rows, Units

# Short climbs: a domain inherits what its parents found, and is halved again or proved. On
# cifar_model at 2/255, 5 steps took two thirds of the time of 10 for the same proof.
RATES, ITERATIONS = (0.1, 0.1), 5  # of alpha and beta
CANDIDATES = 6  # units whose halves are bounded to choose one
LEAF_TOLERANCE = 1e-6  # of the linear program
BATCHES = (8, 64)  # domains halved at once: the first few, and then


class Outcome(NamedTuple):
    """How branching ended: 'verified', 'falsified' (with the flat image) or 'undecided' (with the
    reason), the least bound that is left, and how many domains were bounded."""

    status: str
    bound: float
    domains: int
    adversarial: np.ndarray | None = None
    reason: str = ''


class _Open(NamedTuple):
    """A domain whose bound is not above 0: of which margin, its arrays [U], what to split."""

    row: int
    domain: Domains
    gain: np.ndarray


def branch(
    units: Units,
    sizes: tuple[int, ...],
    rows: Rows,
    roots: tuple[splits.Bound, Domains],
    ball: Ball,
    fools: Callable[[np.ndarray], np.ndarray | None],
    deadline: float,
) -> Outcome:
    """Returns whether all rows [S] are above 0 on the ball.

    roots: each row's bound of the whole ball, and its slopes; fools(points [D, P]) -> one of them
    that the network gets wrong, or None; deadline: of time.monotonic().
    """
    queue, number, visited = [], count(), len(rows.bias)
    placed = jax.device_put((units, ball))

    def push(row_of, bounds, domains):
        for i in np.flatnonzero(~(bounds.lower > 0)):  # a NaN proves nothing
            parts = jax.tree.map(lambda x, i=i: x[i].copy(), (domains, bounds.gain))
            heapq.heappush(queue, (float(bounds.lower[i]), next(number), _Open(row_of[i], *parts)))

    push(np.arange(len(rows.bias)), *jax.device_get(roots))
    while queue:
        if time.monotonic() > deadline:
            return Outcome('undecided', queue[0][0], visited, reason='timeout')
        size = next((b for b in BATCHES if b >= len(queue)), BATCHES[-1])
        popped = [heapq.heappop(queue) for _ in range(min(size, len(queue)))]
        for bound, _, leaf in popped:
            if not leaf.gain.any() and (found := _leaf(units, sizes, rows, leaf, ball, fools)):
                status, point, reason = found
                return Outcome(status, bound, visited, point, reason)
        parents = [parent for _, _, parent in popped if parent.gain.any()]
        if not parents:
            continue
        bounds, domains = _halved(*placed, sizes, rows, parents, size)
        visited += 2 * len(parents)
        if (point := fools(bounds.worst)) is not None:
            return Outcome('falsified', popped[0][0], visited, point)
        real = np.flatnonzero(np.arange(2 * size) % size < len(parents))
        row_of = np.tile([parent.row for parent in parents], 2)
        push(row_of, *jax.tree.map(lambda x, real=real: x[real], (bounds, domains)))
    return Outcome('verified', 0.0, visited)


def _halved(units, ball, sizes, rows, parents, size):
    """The bounds of both halves of each parent, and the halves, [2 size], on the host."""
    fill = size - len(parents)
    row_of = np.array([parent.row for parent in parents])
    stack = jax.tree.map(lambda *x: np.stack([*x, *[x[0]] * fill]), *[p[1:] for p in parents])
    taken = rows.at(row_of).filled(size)
    candidates = min(CANDIDATES, len(units.lower))
    halves = splits.halves(units, sizes, taken, *stack, ball, candidates)
    both = Rows(*(np.concatenate([part, part]) for part in taken))
    return jax.device_get(splits.climb(units, sizes, both, halves, ball, RATES, ITERATIONS))


def _leaf(units, sizes, rows, leaf, ball, fools):
    """None where a domain without unstable units is proved by a linear program, else what it says.

    Of t, the largest of the margin and of all -s z, the least value over the box: above 0, no point
    of the domain has a margin of 0 or less.
    """
    if ball.norm != 'linf':
        return 'undecided', None, f'all is split, and in {ball.norm} no linear program decides'
    split = leaf.domain.split
    lower, upper = np.where(split > 0, 0, units.lower), np.where(split < 0, 0, units.upper)
    slope = np.where((lower < 0) | (upper <= 0), units.negative_slope, 1)
    z_image, z_bias = _substituted(units.rows, slope, sizes)
    margin = rows.image[leaf.row] + (rows.units[leaf.row] * slope) @ z_image
    offset = rows.bias[leaf.row] + (rows.units[leaf.row] * slope) @ z_bias
    where = split != 0
    signs = split[where, None]
    constraints = np.concatenate([margin[None], -signs * z_image[where]])
    limits = -np.concatenate([[offset], -signs[:, 0] * z_bias[where]])
    pixels = constraints.shape[1]
    from scipy.optimize import linprog  # a quarter of a second, which few networks need

    found = linprog(
        np.append(np.zeros(pixels), 1),
        np.hstack([constraints, -np.ones((len(limits), 1))]),
        limits,
        bounds=[*zip(ball.lower.tolist(), ball.upper.tolist(), strict=True), (None, None)],
    )
    if (
        found.status == 0
        and found.fun > LEAF_TOLERANCE
        and (not ball.sound or _holds(units, sizes, rows, leaf, -found.ineqlin.marginals, ball))
    ):
        return None
    point = fools(found.x[None, :pixels].astype(np.float32)) if found.status == 0 else None
    if point is not None:
        return 'falsified', point, ''
    return 'undecided', None, 'a margin of 0, as far as the linear program can tell'


def _holds(units, sizes, rows, leaf, weights, ball):
    """Whether the program's multipliers, which are those of beta-CROWN, prove the domain.

    weights: of the margin and of each split, at least 0 but for the solver's tolerance.
    """
    beta = np.zeros(len(units.lower))
    beta[leaf.domain.split != 0] = np.maximum(weights[1:], 0) / max(weights[0], LEAF_TOLERANCE)
    domain = jax.tree.map(lambda x: x[None], leaf.domain._replace(beta=beta))
    row = rows.at(slice(leaf.row, leaf.row + 1))
    return splits.certain(units, sizes, row, domain, ball)[0] > 0


def _substituted(rows, slope, sizes):
    """z as functions of the image alone, where every relu is z -> slope z: [U, P] and [U]."""
    image, bias = rows.image.astype(float), rows.bias.astype(float)
    start = 0
    for size in sizes:
        layer = slice(start, start + size)
        before = rows.units[layer, :start] * slope[:start]
        image[layer] += before @ image[:start]
        bias[layer] += before @ bias[:start]
        start += size
    return image, bias
