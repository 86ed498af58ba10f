"""Auto-PGD (Croce & Hein 2020, Algorithm 1), with their losses, in the paper's names."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.attacks.pgd import NORMS, cross_entropy, into_ball, margin, per_image
from robustprune_jax.attacks.slots import Attack, choose, fools

ALPHA, RHO = 0.75, 0.75
TINY = 1e-12


def _at(logits, classes):
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the difference of logits ratio, [B] (Equation 6); 3 classes at least."""
    ordered = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + TINY)


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the targeted difference of logits ratio, [B] (Equation 7); 4 classes at least."""
    ordered = jax.lax.top_k(logits, 4)[0]
    scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return (_at(logits, targets) - _at(logits, labels)) / (scale + TINY)


def _cross_entropy(logits, labels, targets):
    return cross_entropy(logits, labels)


# An image's start, before it is scaled to the ball's boundary: (key, shape) -> noise.
NOISE: dict[str, Callable] = {
    'linf': lambda key, shape: jax.random.uniform(key, shape, minval=-1),
    'l2': jax.random.normal,
}

# Each maps logits [B, K], labels [B], targets [B] to what is ascended, [B].
LOSSES: dict[str, Callable] = {'ce': _cross_entropy, 'dlr': dlr, 'dlr_targeted': targeted_dlr}


def checkpoints(steps: int) -> np.ndarray:
    """Returns [steps + 1]: at the paper's w_j the steps since w_{j-1}, elsewhere 0."""
    windows = np.zeros(steps + 1, np.int32)
    before, p, w = 0.0, 0.22, 0
    while p <= 1:
        w_next = min(math.ceil(p * steps - 1e-9), steps)
        windows[w_next] = w_next - w
        before, p, w = p, p + max(p - before - 0.03, 0.06), w_next
    return windows


def _start(slot, eps, *, norm, loss, steps, samples):
    images = slot['image']
    noise = jax.vmap(lambda key: NOISE[norm](key, images.shape[1:]))(slot['key'])
    size = per_image(NORMS[norm].size(noise), noise)
    x = jnp.clip(images + eps * noise / size, 0, 1)
    low = jnp.full(len(images), -jnp.inf)
    return {
        'x': x,
        'previous': x,
        'loss': low,
        'x_max': x,
        'f_max': low,
        'gradient_max': jnp.zeros_like(x),
        'eta': jnp.full(len(images), 2.0) * eps,
        'increases': jnp.zeros(len(images), jnp.int32),
        'f_max_before': low,  # at the last checkpoint
        'halved': jnp.ones(len(images), bool),  # eta, there
    }


def _ascent(logits_fn, slot, age, x, loss, samples):
    """The loss's gradient at x, the losses [B], and whether x fools [B]. Of a random network the
    first two are means over the draws, and the last draw says what fools."""
    if samples:
        keys = jax.random.split(jax.random.fold_in(slot['key'][0], age[0]), samples)
        draws = jax.vmap(logits_fn, (0, None))
    else:
        keys, draws = None, lambda _, x: logits_fn(x)[None]

    def total(x):
        logits = draws(keys, x)
        losses = jax.vmap(LOSSES[loss], (0, None, None))(logits, slot['label'], slot['target'])
        losses = jnp.mean(losses, axis=0)
        return jnp.sum(losses), (losses, logits[-1])

    gradient, (losses, logits) = jax.grad(total, has_aux=True)(x)
    return gradient, losses, fools(logits, slot['label'])


def _halved(state, age, steps, f_max, increases):
    """Whether this step is a checkpoint [B], and whether the step size halves there [B]."""
    window = jnp.asarray(checkpoints(steps))[jnp.minimum(age, steps)]
    at_checkpoint = window > 0
    oscillates = increases < RHO * window
    stuck = ~state['halved'] & (f_max <= state['f_max_before'])
    return at_checkpoint, at_checkpoint & (oscillates | stuck)


def _step(logits_fn, slot, age, state, eps, *, norm, loss, steps, samples):
    """One iterate per image: evaluates x, then moves it."""
    ball, image, x = NORMS[norm], slot['image'], state['x']
    gradient, losses, fooled = _ascent(logits_fn, slot, age, x, loss, samples)
    first = age == 0
    best = {'x_max': x, 'f_max': losses, 'gradient_max': gradient}
    best = choose(first | (losses > state['f_max']), best, {name: state[name] for name in best})
    increases = state['increases'] + (~first & (losses > state['loss']))

    at_checkpoint, halve = _halved(state, age, steps, best['f_max'], increases)
    eta = jnp.where(halve, state['eta'] / 2, state['eta'])
    x0, ascent = choose(halve, (best['x_max'], best['gradient_max']), (x, gradient))
    z = into_ball(ball, x0 + per_image(eta, x) * ball.direction(ascent), image, eps)
    alpha = per_image(jnp.where(first, 1.0, ALPHA), x)
    moved = x0 + alpha * (z - x0) + (1 - alpha) * (x0 - state['previous'])
    state = {
        'x': into_ball(ball, moved, image, eps),
        'previous': x0,
        'loss': losses,
        **best,
        'eta': eta,
        'increases': jnp.where(at_checkpoint, 0, increases),
        'f_max_before': jnp.where(at_checkpoint, best['f_max'], state['f_max_before']),
        'halved': jnp.where(at_checkpoint, halve, state['halved']),
    }
    return state, x, fooled


def apgd(*, norm: str = 'linf', loss: str = 'ce', steps: int = 100, samples: int = 0) -> Attack:
    """Returns Auto-PGD for `slots.run`: the start point and `steps` steps, in 'linf' or 'l2'.

    loss: 'ce', 'dlr', or 'dlr_targeted' (which reads the targets). samples: above 0, the network is
    random, logits_fn(key, images), and ascends the mean loss of so many draws, of which the last
    says whether an image is fooled.
    """
    settings = (('norm', norm), ('loss', loss), ('steps', steps), ('samples', samples))
    return Attack(_start, _step, steps + 1, settings)
