"""The targeted fast adaptive boundary attack, FAB-T (Croce & Hein 2020b), in the paper's names.

It walks along the boundary between an image's class and a target class, biased towards the image,
in search of the nearest misclassified point.
"""

import jax
import jax.numpy as jnp

from robustprune_jax.attacks.pgd import NORMS
from robustprune_jax.attacks.slots import Attack, choose, fools

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
NEWTON_STEPS = 25


def to_hyperplane(x: jax.Array, w: jax.Array, value: jax.Array, norm: str) -> jax.Array:
    """Returns the smallest step d [B, n] with value + <w, d> = 0 and x + d in [0, 1].

    x, w: [B, n]; value: [B]. Where the box holds no such point, the step that comes closest.

    d = min(lambda * s, room) in each coordinate, along -sign(value) * w, where s is 1 (linf) or
    |w| (l2). What it gains, <|w|, d>, is concave and piecewise linear in lambda, so Newton's
    method from 0 rises to the solution and, once past the last coordinate to fill, is there.
    """
    towards = -jnp.sign(value)[:, None] * jnp.sign(w)
    room = jnp.where(towards > 0, 1 - x, x)
    size, needed = jnp.abs(w), jnp.abs(value)
    slope = jnp.ones_like(w) if norm == 'linf' else size

    def newton(state):
        _, length, steps = state
        free = length[:, None] * slope < room
        gained = jnp.sum(jnp.where(free, 0, size * room), axis=1)
        rate = jnp.sum(jnp.where(free, size * slope, 0), axis=1)
        longer = jnp.where(rate > 0, jnp.maximum((needed - gained) / rate, length), length)
        return jnp.any(longer > length * (1 + 1e-6)), longer, steps + 1

    start = (jnp.bool(True), jnp.zeros_like(needed), 0)
    _, length, _ = jax.lax.while_loop(lambda s: s[0] & (s[2] < NEWTON_STEPS), newton, start)
    return towards * jnp.minimum(length[:, None] * slope, room)


def _start(slot, eps, *, norm):
    return {'x': slot['image']}


def _step(logits_fn, slot, age, state, eps, *, norm):
    image, label, x, size = slot['image'], slot['label'], state['x'], NORMS[norm].size
    flat_image, flat_x = image.reshape(len(x), -1), x.reshape(len(x), -1)

    def difference(x):
        logits = logits_fn(x).astype(x.dtype)  # of a network in half precision
        every = jnp.arange(len(x))
        f = logits[every, slot['target']] - logits[every, label]
        return jnp.sum(f), f

    w, f = jax.grad(difference, has_aux=True)(x)
    w = w.reshape(len(x), -1)
    f_image = f + jnp.sum(w * (flat_image - flat_x), axis=1)
    step_x = to_hyperplane(flat_x, w, f, norm)
    step_image = to_hyperplane(flat_image, w, f_image, norm)
    near, far = (jnp.maximum(size(d), 1e-8) for d in (step_x, step_image))
    alpha = jnp.minimum(near / (near + far), ALPHA_MAX)[:, None]
    moved = (flat_x + ETA * step_x) * (1 - alpha) + (flat_image + ETA * step_image) * alpha
    moved = jnp.clip(moved, 0, 1)
    candidate = moved.reshape(x.shape)
    crossed = fools(logits_fn(candidate), label)
    within = size(moved - flat_image) <= eps
    back = image + BETA * (candidate - image)
    return {'x': choose(crossed, back, candidate)}, candidate, crossed & within


def fab(*, norm: str = 'linf', steps: int = 100) -> Attack:
    """Returns FAB-T for `slots.run`, in 'linf' or 'l2'; it begins at the image itself."""
    return Attack(_start, _step, steps, (('norm', norm),))
