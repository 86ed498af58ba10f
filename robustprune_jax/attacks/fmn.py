"""The fast minimum-norm attack, FMN (Pintor et al. 2021, Algorithm 1), in the paper's names.

It descends towards the boundary within a ball whose radius epsilon shrinks while the network is
fooled and grows while it is not, and keeps the smallest perturbation that fooled.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.attacks.apgd import dlr
from robustprune_jax.attacks.pgd import LOSSES as ANY_BALL
from robustprune_jax.attacks.pgd import margin
from robustprune_jax.attacks.slots import (
    Attack,
    choose,
    logits_of,
    on_all_devices,
    on_devices,
    run,
)
from robustprune_jax.runtime import compiler, inputs
from robustprune_jax.runtime.registry import lookup

# Each maps logits [B, K] and labels [B] to what is ascended, [B].
LOSSES: dict[str, Callable] = {**ANY_BALL, 'dlr': partial(dlr, targets=None)}
# Each maps the part of the steps that is done to what is left of the way from first to last value.
SCHEDULES: dict[str, Callable] = {
    'cosine': lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
    'linear': lambda done: 1 - done,
    'constant': jnp.ones_like,
}
# Of the largest logit, by which a perturbation must fool to count: below, rounding decides.
ROUNDING = 1e-5
BISECTIONS = 30


class Ball(NamedTuple):
    """What FMN needs to know of a norm, of perturbations [B, n]."""

    size: Callable[[jax.Array], jax.Array]  # delta -> [B]
    dual: Callable[[jax.Array], jax.Array]  # gradients -> the most that a step of size 1 gains, [B]
    project: Callable  # (delta, low, high, epsilon [B]) -> delta in the ball and from low to high
    alpha: tuple[float, float]  # the first and the last step size


def _l1(x):
    return jnp.sum(jnp.abs(x), axis=1)


def _l2(x):
    return jnp.sqrt(jnp.sum(x * x, axis=1))


def _linf(x):
    return jnp.max(jnp.abs(x), axis=1)


def _l0(x):
    return jnp.sum(x != 0, axis=1).astype(x.dtype)


def _into_linf(delta, low, high, epsilon):
    return jnp.clip(jnp.clip(delta, -epsilon[:, None], epsilon[:, None]), low, high)


def _into_l2(delta, low, high, epsilon):
    scale = jnp.minimum(1, epsilon / jnp.maximum(_l2(delta), 1e-12))
    return jnp.clip(delta * scale[:, None], low, high)


def _into_l1(delta, low, high, epsilon):
    """The nearest point of ball and box: all coordinates shrink by a threshold, then are clipped;
    bisection finds the least one that will do."""

    def shrunk(threshold):
        smaller = jnp.maximum(jnp.abs(delta) - threshold[:, None], 0)
        return jnp.clip(jnp.sign(delta) * smaller, low, high)

    def halve(_, ends):
        too_low, enough = ends
        middle = (too_low + enough) / 2
        fits = _l1(shrunk(middle)) <= epsilon
        return jnp.where(fits, too_low, middle), jnp.where(fits, middle, enough)

    none = jnp.zeros_like(epsilon)
    _, threshold = jax.lax.fori_loop(0, BISECTIONS, halve, (none, _linf(delta)))
    fits = _l1(shrunk(none)) <= epsilon
    return shrunk(jnp.where(fits, none, threshold))


def _into_l0(delta, low, high, epsilon):
    """The nearest point of ball and box: the epsilon coordinates stay that would be missed most."""
    clipped = jnp.clip(delta, low, high)
    missed = delta**2 - (delta - clipped) ** 2
    rank = jnp.argsort(jnp.argsort(-missed, axis=1), axis=1)
    return jnp.where(rank < epsilon[:, None], clipped, 0)


BALLS: dict[str, Ball] = {
    'linf': Ball(_linf, _l1, _into_linf, (10.0, 0.1)),
    'l2': Ball(_l2, _l2, _into_l2, (3.0, 0.03)),
    'l1': Ball(_l1, _linf, _into_l1, (1.0, 0.01)),
    'l0': Ball(_l0, lambda gradient: jnp.full(len(gradient), jnp.inf), _into_l0, (100.0, 1.0)),
}


def _start(slot, eps, **settings):
    image = slot['image']
    flat = image.reshape(len(image), -1)
    return {
        'delta': jnp.zeros_like(flat),
        'epsilon': jnp.zeros(len(image)),
        'best': jnp.zeros_like(flat),
        'smallest': jnp.full(len(image), eps),
    }


def _radius(state, size, crossed, smallest, to_boundary, gamma, norm):
    """The next epsilon [B]; of l_0 a whole number, which changes by 1 at least."""
    epsilon = state['epsilon']
    grown, shrunk = epsilon * (1 + gamma), epsilon * (1 - gamma)
    if norm == 'l0':
        grown = jnp.maximum(jnp.floor(grown), epsilon + 1)
        shrunk = jnp.minimum(jnp.floor(shrunk), epsilon - 1)
    else:  # a little beyond the boundary, which a linear network would else only touch
        further = jnp.maximum(epsilon, size + to_boundary) * (1 + gamma)
        grown = jnp.where(jnp.isinf(smallest), further, grown)
    return jnp.where(crossed, jnp.minimum(shrunk, smallest), grown)


def _step(logits_fn, slot, age, state, eps, *, norm, loss, steps, alpha, gamma, schedule):
    ball, image, label, delta = BALLS[norm], slot['image'], slot['label'], state['delta']

    def network(delta):
        return logits_fn(image + delta.reshape(image.shape)).astype(delta.dtype)

    logits, pullback = jax.vjp(network, delta)
    by_logits = jax.grad(lambda logits: jnp.sum(LOSSES[loss](logits, label)))(logits)
    (gradient,) = pullback(by_logits)
    size, lead = ball.size(delta), ROUNDING * _linf(logits) - margin(logits, label)
    crossed = lead < 0
    smaller = crossed & (size < state['smallest'])
    best, smallest = choose(smaller, (delta, size), (state['best'], state['smallest']))

    left = SCHEDULES[schedule](age / steps)
    alpha, gamma = (last + (first - last) * left for first, last in (alpha, gamma))
    # What the loss gains as the lead falls by 1, to first order: of a lead itself, 1.
    own = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    slope = jnp.sum(jnp.where(own, 0, by_logits), axis=1)
    steepest = ball.dual(gradient)
    to_boundary = lead * slope / jnp.where(steepest > 0, steepest, 1)
    epsilon = _radius(state, size, crossed, smallest, to_boundary, gamma, norm)
    ascent = gradient / jnp.maximum(_l2(gradient), 1e-12)[:, None]
    flat = image.reshape(delta.shape)
    moved = ball.project(delta + alpha[:, None] * ascent, -flat, 1 - flat, epsilon)
    state = {'delta': moved, 'epsilon': epsilon, 'best': best, 'smallest': smallest}
    candidate = image + best.reshape(image.shape)
    return state, candidate, (age == steps) & (smallest < eps)


@compiler.full_precision
def fmn(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array,
    *,
    norm: str = 'linf',
    steps: int = 100,
    loss: str = 'margin',
    alpha: tuple[float, float] | None = None,
    gamma: tuple[float, float] = (0.05, 0.001),
    schedule: str = 'cosine',
    batch_size: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest images found that the network misclassifies, and how far they are.

    images: [N, H, W, C] in [0, 1], any number; labels: [N] ints. norm: 'linf', 'l2', 'l1', or
    'l0', the number of values (pixels times channels) that change. steps: forward and backward
    passes after that of the image itself. loss: 'margin' (the paper's difference of logits), 'ce'
    or 'dlr', ascended. alpha: the first and the last step size in l_2, default by the norm; gamma:
    the first and the last part by which the radius changes; schedule: how both pass from first to
    last, 'cosine', 'linear' or 'constant'. batch_size: images in one compiled batch, which is split
    over the devices of this process.

    The images are float32 [N, H, W, C] in [0, 1], the distances float32 [N] in `norm`, in pixel
    units: 0 where the image itself is misclassified, infinite, beside the clean image, where no
    step fooled the network. A distance is an upper bound of the smallest one.

    Raises ValueError on settings or images without meaning and on fewer classes than 'dlr' needs,
    3. Not for use in `jit`. The network should be in eval mode.
    """
    ball = lookup(BALLS, norm, 'norm')
    lookup(LOSSES, loss, 'loss')
    lookup(SCHEDULES, schedule, 'schedule')
    for name, value in {'steps': steps, 'batch_size': batch_size}.items():
        if value < 1:
            raise ValueError(f'{name} is {value}: expected at least 1')
    inputs.check(images, labels)
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    batch_size, logits_fn = on_all_devices(batch_size), on_devices(logits_fn)
    logits = logits_of(logits_fn, images, batch_size)
    inputs.check_classes(labels, logits.shape[-1])
    if loss == 'dlr' and logits.shape[-1] < 3:
        raise ValueError(f'dlr needs at least 3 classes, the network has {logits.shape[-1]}')
    settings = {
        'norm': norm,
        'loss': loss,
        'steps': steps,
        'alpha': alpha or ball.alpha,
        'gamma': gamma,
        'schedule': schedule,
    }
    adversarial = images.copy()
    distances = np.where(logits.argmax(-1) == labels, np.inf, 0).astype(np.float32)
    index = np.flatnonzero(distances)
    found, fooled = run(
        Attack(_start, _step, steps + 1, tuple(settings.items())),
        logits_fn,
        jax.random.key(0),  # it draws nothing
        images[index],
        labels[index],
        np.zeros((len(index), 1), int),
        index,
        eps=math.inf,
        batch_size=batch_size,
    )
    index, found = index[fooled], found[fooled]
    if len(index):
        # The attack's own forward pass is another program, whose rounding may differ.
        wrong = logits_of(logits_fn, found, batch_size).argmax(-1) != labels[index]
        index, found = index[wrong], found[wrong]
        adversarial[index] = found
        distances[index] = ball.size((found - images[index]).reshape(len(index), -1))
    return adversarial, distances
