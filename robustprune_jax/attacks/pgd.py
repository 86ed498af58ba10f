"""Projected gradient descent on any logits function (Madry et al. 2018)."""

from collections.abc import Callable
from functools import partial

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


def _l2(x):
    return per_image(jnp.sqrt(jnp.sum(x.reshape(len(x), -1) ** 2, axis=1)), x)


def _linf_start(key, images, eps):
    return images + jax.random.uniform(key, images.shape, images.dtype, -eps, eps)


def _l2_start(key, images, eps):
    """Uniform in the ball: a random direction, and a radius whose volume is uniform."""
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, images.shape, images.dtype)
    radius = jax.random.uniform(radius_key, (len(images),)) ** (1 / images[0].size)
    return images + eps * per_image(radius, images) * direction / _l2(direction)


def _linf_project(x, images, eps):
    return jnp.clip(x, images - eps, images + eps)


def _l2_project(x, images, eps):
    delta = x - images
    return images + delta * jnp.minimum(1, eps / jnp.maximum(_l2(delta), 1e-12))


def _l2_direction(gradient):
    return gradient / jnp.maximum(_l2(gradient), 1e-12)


# norm -> (random start in the ball, projection to the ball, steepest direction)
NORMS: dict[str, tuple[Callable, Callable, Callable]] = {
    'linf': (_linf_start, _linf_project, jnp.sign),
    'l2': (_l2_start, _l2_project, _l2_direction),
}


@partial(jax.jit, static_argnames='norm')
def _step(logits_fn, loss, x, images, labels, eps, step_size, norm):
    """One ascent step from x: along the steepest direction, into [0, 1], back into the ball."""
    _, project, direction = NORMS[norm]
    gradient = jax.grad(lambda x: jnp.sum(loss(logits_fn(x), labels)))(x)
    # Clipping first keeps the l_2 form in the ball; projection moves towards the image, so the
    # result stays in [0, 1].
    return project(jnp.clip(x + step_size * direction(gradient), 0, 1), images, eps)


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
    ('linf' or 'l2'). Each restart begins at a random point of the ball and keeps its last iterate;
    per image the first restart that fools the network wins, otherwise the one of highest loss.
    start: start images [B, H, W, C] of the first restart. loss: a name of LOSSES, or
    (logits, labels) -> [B], ascended. Raises ValueError on an unknown norm or loss and, outside
    `jit`, on images, labels or eps that are not what they should be.

    Runs inside or outside `jit`. The network should be in eval mode.
    """
    lookup(NORMS, norm, 'norm')
    loss = lookup(LOSSES, loss, 'loss') if isinstance(loss, str) else loss
    # Both are pytrees, so a new closure over new weights never retraces.
    logits_fn, loss = (f if isinstance(f, Partial) else Partial(f) for f in (logits_fn, loss))
    inputs.check(images, labels, eps=eps, norm=norm)
    inputs.check_network(logits_fn, images, labels)
    ascend = _unrolled if compiler.backend() == 'cpu' else _looped
    best = best_badness = None
    for restart in range(restarts):
        if restart or start is None:
            x = jnp.clip(NORMS[norm][0](jax.random.fold_in(key, restart), images, eps), 0, 1)
        else:
            x = start
        x = ascend(logits_fn, loss, x, images, labels, eps, step_size, steps, norm)
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
