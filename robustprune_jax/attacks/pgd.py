"""Projected gradient descent on any logits function: start x direction x projection x loss.

    x <- project(x + step_size * direction(gradient of loss(logits_fn(x), labels)))

The attacks of the field are `pgd` with these arguments:

- PGD (Madry et al. 2018): its defaults, a random start and cross-entropy;
- FGSM (Goodfellow et al. 2015): start=images, steps=1, step_size=eps;
- fast adversarial training's (Wong et al. 2020): steps=1, step_size=1.25 * eps;
- Carlini & Wagner's loss (2017) in a ball: loss='margin';
- targeted: loss=lambda logits, labels: -cross_entropy(logits, targets);
- TRADES' (Zhang et al. 2019): start=images + 0.001 * noise, loss=KL to the clean prediction;
- SmoothAdv's (Salman et al. 2019): logits_fn=the logarithm of the mean softmax under noise.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from robustprune_jax.runtime import compiler, inputs
from robustprune_jax.runtime.registry import lookup


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each example, [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the largest wrong logit minus the right one, [B] (Carlini & Wagner 2017, f6)."""
    right = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    wrong = jnp.max(jnp.where(right, -jnp.inf, logits), axis=-1)
    return wrong - jnp.sum(jnp.where(right, logits, 0), axis=-1)


LOSSES: dict[str, Callable] = {'ce': cross_entropy, 'margin': margin}


def per_image(values: jax.Array, images: jax.Array) -> jax.Array:
    """Returns [B] values with the trailing axes that broadcast against `images`."""
    return values.reshape(values.shape + (1,) * (images.ndim - 1))


class Norm(NamedTuple):
    """What an attack needs to know of a norm, as functions of batches [B, ...]."""

    size: Callable[[jax.Array], jax.Array]  # x -> [B]
    start: Callable  # (key, images, eps) -> random points of the ball around each image
    direction: Callable[[jax.Array], jax.Array]  # gradients -> steepest ascents, of size 1
    project: Callable  # (x, images, eps) -> the nearest points of the ball around each image


def _linf_size(x):
    return jnp.max(jnp.abs(x.reshape(len(x), -1)), axis=1)


def _l2_size(x):
    return jnp.sqrt(jnp.sum(x.reshape(len(x), -1) ** 2, axis=1))


def _linf_start(key, images, eps):
    return images + jax.random.uniform(key, images.shape, images.dtype, -eps, eps)


def _l2_start(key, images, eps):
    """Uniform in the ball: a random direction, and a radius whose volume is uniform."""
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, images.shape, images.dtype)
    radius = jax.random.uniform(radius_key, (len(images),)) ** (1 / images[0].size)
    size = per_image(_l2_size(direction), images)
    return images + eps * per_image(radius, images) * direction / size


def _l2_direction(gradient):
    return gradient / jnp.maximum(per_image(_l2_size(gradient), gradient), 1e-12)


def _linf_project(x, images, eps):
    return jnp.clip(x, images - eps, images + eps)


def _l2_project(x, images, eps):
    delta = x - images
    size = per_image(_l2_size(delta), delta)
    return images + delta * jnp.minimum(1, eps / jnp.maximum(size, 1e-12))


NORMS: dict[str, Norm] = {
    'linf': Norm(_linf_size, _linf_start, jnp.sign, _linf_project),
    'l2': Norm(_l2_size, _l2_start, _l2_direction, _l2_project),
}


def into_ball(norm: Norm, x: jax.Array, images: jax.Array, eps: float) -> jax.Array:
    """Returns x moved into [0, 1], then into the ball of eps around each image.

    In this order both hold: the ball's projection moves towards the image, which is in [0, 1].
    """
    return norm.project(jnp.clip(x, 0, 1), images, eps)


@partial(jax.jit, static_argnames='norm')
def _step(logits_fn, loss, x, images, labels, eps, step_size, norm):
    """One ascent step from x."""
    gradient = jax.grad(lambda x: jnp.sum(loss(logits_fn(x), labels)))(x)
    return into_ball(norm, x + step_size * norm.direction(gradient), images, eps)


@partial(jax.jit, static_argnames=('steps', 'norm'))
def _looped(logits_fn, loss, x, images, labels, eps, step_size, steps, norm):
    """All steps as one program."""
    return jax.lax.fori_loop(
        0, steps, lambda _, x: _step(logits_fn, loss, x, images, labels, eps, step_size, norm), x
    )


def _unrolled(logits_fn, loss, x, images, labels, eps, step_size, steps, norm):
    """The same for CPU, where convolutions inside a loop body run 2.6 times slower. Outside jit
    this is a loop of dispatches of one compiled step."""
    for _ in range(steps):
        x = _step(logits_fn, loss, x, images, labels, eps, step_size, norm)
    return x


@jax.jit
def _badness(logits_fn, loss, x, labels):
    """How good an attack x is: misclassified beats any loss."""
    logits = logits_fn(x)
    return jnp.where(jnp.argmax(logits, -1) != labels, jnp.inf, loss(logits, labels))


def pgd(
    logits_fn: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = 'linf',
    restarts: int = 1,
    start: jax.Array | None = None,
    loss: str | Callable[[jax.Array, jax.Array], jax.Array] = 'ce',
) -> jax.Array:
    """Returns adversarial images within `eps` of `images` and in [0, 1], same shape.

    images: [B, H, W, C] in [0, 1]; labels: [B] ints; eps and step_size in pixel units, in `norm`
    (a name of NORMS). Each restart begins at a random point of the ball and keeps its last iterate;
    per image the first restart that fools the network wins, otherwise the one of highest loss.
    start: start images [B, H, W, C] of the first restart. loss: a name of LOSSES, or
    (logits, labels) -> [B], ascended. Raises ValueError on an unknown norm or loss and, outside
    `jit`, on images, labels or eps that are not what they should be.

    Runs inside or outside `jit`. The network should be in eval mode.
    """
    ball = lookup(NORMS, norm, 'norm')
    loss = lookup(LOSSES, loss, 'loss') if isinstance(loss, str) else loss
    # Both are pytrees, so a new closure over new weights never retraces.
    logits_fn, loss = (f if isinstance(f, Partial) else Partial(f) for f in (logits_fn, loss))
    inputs.check(images, labels, eps=eps, norm=norm)
    inputs.check_network(logits_fn, images, labels)
    ascend = _unrolled if compiler.backend() == 'cpu' else _looped
    best = best_badness = None
    for restart in range(restarts):
        if restart or start is None:
            x = jnp.clip(ball.start(jax.random.fold_in(key, restart), images, eps), 0, 1)
        else:
            x = start
        x = ascend(logits_fn, loss, x, images, labels, eps, step_size, steps, ball)
        if restarts == 1:
            return x
        badness = _badness(logits_fn, loss, x, labels)
        if best is None:
            best, best_badness = x, badness
        else:
            better = badness > best_badness
            best = jnp.where(per_image(better, images), x, best)
            best_badness = jnp.maximum(badness, best_badness)
    return best
