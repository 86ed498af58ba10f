"""beta-CROWN (Wang et al. 2021): bounds of rows over the units of a network, some of them split.

A split s in {1, -1} of a unit says s z >= 0. There the relu is affine, and b s z, b >= 0, may be
taken from what is bounded: Lagrange's multipliers of the splits. Every b gives a sound bound, as
does every lower slope of a unit that is not split.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robustprune_jax.bounds import linear, rounding
from robustprune_jax.bounds.nodes import Array
from robustprune_jax.bounds.relu import Relu, crown_slope
from robustprune_jax.bounds.units import Rows, Units
from robustprune_jax.bounds.windows import product

DECAY = 0.98  # of the rates, each step
TINY = 1e-12  # so that a unit that seems to lose nothing is still one to split


class Domains(NamedTuple):
    """Parts of the ball, each with what its bound is made of, all [D, U].

    split: 1, -1, or 0 where a unit is not split; alpha: lower slopes; beta: multipliers.
    """

    split: Array
    alpha: Array
    beta: Array


class Bound(NamedTuple):
    """lower: [D], of the rows; worst: [D, P], the images where the linear forms are least; gain:
    [D, U], what the relaxation of a unit may lose, 0 where it is decided."""

    lower: Array
    worst: Array
    gain: Array


def whole(units: Units, count: int) -> Domains:
    """Returns `count` times the whole ball, with CROWN's slopes."""
    relu = Relu((0,), units.negative_slope)
    _, _, below = relu.lines(units.lower, units.upper, crown_slope)
    alpha = jnp.broadcast_to(below, (count, len(below)))
    return Domains(jnp.zeros_like(alpha), alpha, jnp.zeros_like(alpha))


def bound(
    units: Units, sizes: tuple[int, ...], rows: Rows, domains: Domains, ball: linear.Ball
) -> Bound:
    """Returns the bounds of one row [D] in each domain, by one backward pass over the layers.

    sizes: how many units each layer has; ball: of flat images [P].
    """
    lower = jnp.where(domains.split > 0, jnp.maximum(units.lower, 0), units.lower)
    upper = jnp.where(domains.split < 0, jnp.minimum(units.upper, 0), units.upper)
    relu = Relu((0,), units.negative_slope)
    above, intercept, below = relu.lines(lower, upper, lambda *_: domains.alpha)
    coefficients, low, image, end = rows.units, rows.bias, rows.image, sum(sizes)
    outputs, lost, used = [], rows.error, rounding.gamma(end + image.shape[1], low.dtype)
    for size, seen in zip(reversed(sizes), reversed(units.windows), strict=True):
        layer = slice(end - size, end)
        end -= size
        row = coefficients[:, layer]
        positive, negative = jnp.maximum(row, 0), jnp.minimum(row, 0)
        z = positive * below[:, layer] + negative * above[:, layer]
        z -= (domains.beta * domains.split)[:, layer]
        if ball.sound:
            sizes_of_z = rounding.size(lower, upper)[:, layer]
            relaxed = jnp.abs(row) + domains.beta[:, layer] + rounding.FLOOR
            lost += used * jnp.sum(relaxed * sizes_of_z, axis=1)
            lost += (jnp.abs(z) + rounding.FLOOR) @ units.rows.error[layer]
        low += jnp.sum(negative * intercept[:, layer], axis=1) + z @ units.rows.bias[layer]
        coefficients = coefficients[:, :end] + z @ units.rows.units[layer, :end]
        image += product(z, seen, image.shape[1])
        outputs.insert(0, row)
    row = jnp.concatenate([rows.units[:, :0], *outputs], axis=1)
    # What is left of the gap below relu, at the end where the lower line leaves less.
    loose = jnp.minimum(-domains.alpha * lower, (1 - domains.alpha) * upper)
    gain = jnp.maximum(row, 0) * loose - jnp.minimum(row, 0) * intercept
    gain = jnp.where(relu.undecided(lower, upper), gain + TINY, 0)
    low += linear.lowest_in_ball(image, ball)
    return Bound(low - 1.001 * lost if ball.sound else low, _least(image, ball), gain)


def _least(rows, ball):
    """Points [D, P] of the box where rows are least, in the ball or, in l_2, towards its border."""
    if ball.norm == 'linf':
        return jnp.where(rows > 0, ball.lower, ball.upper)
    if ball.norm == 'l1':
        largest = jnp.abs(rows) == jnp.abs(rows).max(axis=1, keepdims=True)
        direction = jnp.sign(rows) * largest / jnp.sum(largest, axis=1, keepdims=True)
    else:
        direction = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return jnp.clip(ball.image - ball.eps * direction, ball.lower, ball.upper)


def certain(
    units: Units, sizes: tuple[int, ...], rows: Rows, domains: Domains, ball: linear.Ball
) -> np.ndarray:
    """Returns what is left [D] of the domains' bounds when all rounding is taken off."""
    with jax.enable_x64(True):
        lower = np.asarray(_in_float64(units, sizes, rows, domains, ball))
    return np.nextafter(np.float32(lower), np.float32(-np.inf))


@partial(jax.jit, static_argnames='sizes')
def _in_float64(units, sizes, rows, domains, ball):
    def wide(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    units, rows, domains, ball = jax.tree.map(wide, (units, rows, domains, ball))
    return bound(units, sizes, rows, domains, ball).lower


def climb(
    units: Units,
    sizes: tuple[int, ...],
    rows: Rows,
    domains: Domains,
    ball: linear.Ball,
    rates: tuple[float, float],
    iterations: int,
) -> tuple[Bound, Domains]:
    """Returns the best bounds of one row [D] in each domain, and the slopes and multipliers there.

    Projected Adam, at `rates` of (alpha, beta); ends early where every bound is above 0. A bound
    is never below that of the slopes and multipliers given. What is found in float32 is bounded
    once more where it is to be sound.
    """
    plain = ball.replace(sound=False)
    found, domains = _climb(units, sizes, rows, domains, plain, rates, iterations)
    if ball.sound:
        found = found._replace(lower=certain(units, sizes, rows, domains, ball))
    return found, domains


@partial(jax.jit, static_argnames='sizes')
def _climb(units, sizes, rows, domains, ball, rates, iterations):
    floor = units.negative_slope

    def lower_of(free):
        at = bound(units, sizes, rows, Domains(domains.split, *free), ball)
        return jnp.sum(at.lower), at.lower

    def ascend(carry):
        step, free, state, best, best_free = carry
        (_, lower), gradient = jax.value_and_grad(lower_of, has_aux=True)(free)
        better = (lower > best)[:, None]
        best_free = jax.tree.map(partial(jnp.where, better), free, best_free)
        updates, state = adam.update(gradient, state)
        alpha, beta = (
            value + rate * DECAY**step * update
            for value, rate, update in zip(free, rates, updates, strict=True)
        )
        free = jnp.clip(alpha, floor, 1), jnp.maximum(beta, 0)
        return step + 1, free, state, jnp.maximum(lower, best), best_free

    def goes_on(carry):
        step, *_, best, _ = carry
        return (step <= iterations) & ~jnp.all(best > 0)

    adam = optax.scale_by_adam()
    free = domains.alpha, domains.beta
    worst = jnp.full(len(rows.bias), -jnp.inf, rows.bias.dtype)
    carry = (0, free, adam.init(free), worst, free)
    *_, best_free = jax.lax.while_loop(goes_on, ascend, carry)
    domains = Domains(domains.split, *best_free)
    return bound(units, sizes, rows, domains, ball), domains


@partial(jax.jit, static_argnames=('sizes', 'candidates'))
def halves(
    units: Units,
    sizes: tuple[int, ...],
    rows: Rows,
    domains: Domains,
    gain: Array,
    ball: linear.Ball,
    candidates: int,
) -> Domains:
    """Returns both halves of each domain, [2 D, U]: all the first, then all the second ones.

    Of the `candidates` units of largest gain, the one is split whose worse half has the best bound,
    with the slopes and multipliers as they are (kFSB, Wang et al. 2021).
    """
    ball = ball.replace(sound=False)
    _, tried = jax.lax.top_k(gain, candidates)

    def worse_half(unit):
        pair = jax.vmap(lambda side: bound(units, sizes, rows, _half(domains, unit, side), ball))
        return jnp.min(pair(jnp.array([1.0, -1.0], rows.bias.dtype)).lower, axis=0)

    scores = jax.lax.map(worse_half, tried.T)
    # Where fewer are open than candidates, the rest have no gain.
    scores = jnp.where(jnp.take_along_axis(gain, tried, 1).T > 0, scores, -jnp.inf)
    unit = jnp.take_along_axis(tried, jnp.argmax(scores, axis=0)[:, None], 1)[:, 0]
    both = [_half(domains, unit, side) for side in (1, -1)]
    return jax.tree.map(lambda *sides: jnp.concatenate(sides), *both)


def _half(domains, unit, side):
    split = domains.split.at[jnp.arange(len(unit)), unit].set(side)
    return domains._replace(split=split)
