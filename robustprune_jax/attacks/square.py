"""The Square attack (Andriushchenko et al. 2020): random search on scores, in the paper's names.

It asks for logits only, so that it does not depend on gradients: one query per step.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.attacks.pgd import NORMS, margin
from robustprune_jax.attacks.slots import Attack, choose, fools

P_INIT = 0.8
# Of 10,000 queries, those after which the changed part p of the image halves.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
TILES = 5  # per side, of the l_2 start


def widths(queries: int, height: int, width: int, norm: str) -> np.ndarray:
    """Returns the side of the square that each query changes, [queries], in pixels."""
    schedule = np.arange(queries) * 10_000 // queries
    p = P_INIT / 2.0 ** np.searchsorted(HALVINGS, schedule)
    side = np.round(np.sqrt(p * height * width)).astype(np.int32)
    if norm == 'linf':
        return np.clip(side, 1, max(min(height, width) - 1, 1))
    side = np.maximum(side, 3)
    side += side % 2 == 0
    largest = min(height, width)
    return np.minimum(side, largest - (largest % 2 == 0))


def _centred(height, width):
    """One half of eta: sum of squares about the centre, the n-th of height 1 / n^2."""
    rings = max(height // 2, width // 2) + 1
    from_centre = np.maximum(
        np.abs(np.arange(height) - height // 2)[:, None],
        np.abs(np.arange(width) - width // 2)[None],
    )
    tails = np.cumsum((1 / np.arange(1, rings + 1) ** 2)[::-1])[::-1]
    half = tails[from_centre]
    return half / np.linalg.norm(half)


def eta(side: int) -> np.ndarray:
    """Returns the l_2 pattern [side, side] of norm 1: a hill and, below it, a valley."""
    pattern = np.concatenate([_centred(side // 2, side), -_centred(side - side // 2, side)])
    return (pattern / np.linalg.norm(pattern)).astype(np.float32)


def _start(slot, eps, *, norm, queries):
    image = slot['image']
    count, height, width, channels = image.shape
    if norm == 'linf':  # vertical stripes
        sign = _signs(slot['key'], (1, width, channels))
        return {'best': image, 'loss': jnp.full(count, -jnp.inf), 'start': image + eps * sign}
    tile = max(min(height, width) // TILES, 2)
    down, across = height // tile, width // tile
    edge = (height - down * tile) // 2, (width - across * tile) // 2
    sign = _signs(slot['key'], (down, 1, across, 1, channels))
    tiles = (sign * jnp.asarray(eta(tile))[None, None, :, None, :, None]).reshape(
        count, down * tile, across * tile, channels
    )
    room = [(e, size - e - n * tile) for e, size, n in
            zip(edge, (height, width), (down, across), strict=True)]  # fmt: skip
    delta = jnp.pad(tiles, [(0, 0), *room, (0, 0)])
    return {
        'best': image,
        'loss': jnp.full(count, -jnp.inf),
        'start': image + eps * delta / _norm(delta, (1, 2, 3)),
    }


def _signs(keys, shape):
    return jax.vmap(lambda key: jax.random.rademacher(key, shape, jnp.float32))(keys)


def _norm(x, axes):
    return jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True)) + 1e-12


def _windows(side, uniform, height, width):
    """Masks [B, H, W, 1] of squares of `side` [B] at a place drawn by uniform [B, 2], and it."""
    room = jnp.stack([height - side, width - side], axis=1) + 1
    place = jnp.minimum((uniform * room).astype(jnp.int32), room - 1)
    inside = []
    for axis, size in enumerate((height, width)):
        pixel = jnp.arange(size)[None]
        corner = place[:, axis, None]
        inside.append((pixel >= corner) & (pixel < corner + side[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None], place


def _linf_candidate(uniform, sign, side, image, best, eps, queries):
    window, _ = _windows(side, uniform[:, :2], *image.shape[1:3])
    changed = jnp.where(window, best + 2 * eps * sign[:, None, None], best)
    return NORMS['linf'].project(changed, image, eps)


def _l2_candidate(uniform, sign, side, image, best, eps, queries):
    """Moves the perturbation of one window into another, there shaped by eta."""
    _, height, width, channels = image.shape
    delta = best - image
    target, place = _windows(side, uniform[:, :2], height, width)
    source, _ = _windows(side, uniform[:, 2:4], height, width)
    sides = sorted(set(widths(queries, height, width, 'l2').tolist()))
    table = np.zeros((2, len(sides), height, width), np.float32)
    for i, n in enumerate(sides):
        table[0, i, :n, :n], table[1, i, :n, :n] = eta(n), eta(n).T
    which = jnp.searchsorted(jnp.asarray(sides), side)
    turned = (uniform[:, 4] > 0.5).astype(jnp.int32)
    pattern = jax.vmap(partial(jnp.roll, axis=(0, 1)))(jnp.asarray(table)[turned, which], place)
    spatial = (1, 2)
    inside = jnp.where(target, delta, 0)
    budget = _norm(jnp.where(target | source, delta, 0), spatial) ** 2
    unused = jnp.maximum(eps**2 - _norm(delta, (1, 2, 3)) ** 2, 0) / channels
    new = pattern[..., None] * sign[:, None, None] + inside / _norm(inside, spatial)
    new = new / _norm(new, spatial) * jnp.sqrt(unused + budget)
    delta = jnp.where(target, new, jnp.where(source, 0, delta))
    return image + eps * delta / _norm(delta, (1, 2, 3))


CANDIDATES = {'linf': _linf_candidate, 'l2': _l2_candidate}


def _step(logits_fn, slot, age, state, eps, *, norm, queries):
    image, best = slot['image'], state['best']
    _, height, width, channels = image.shape
    side = jnp.asarray(widths(queries, height, width, norm))[jnp.clip(age - 1, 0, queries - 1)]
    keys = jax.vmap(jax.random.fold_in)(slot['key'], age)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (5 + channels,)))(keys)
    sign = jnp.where(uniform[:, 5:] < 0.5, -1.0, 1.0)
    moved = CANDIDATES[norm](uniform, sign, side, image, best, eps, queries)
    candidate = jnp.clip(choose(age == 0, state['start'], moved), 0, 1)
    logits = logits_fn(candidate)
    loss = margin(logits, slot['label'])
    better = loss > state['loss']
    return (
        {
            'best': choose(better, candidate, best),
            'loss': jnp.where(better, loss, state['loss']),
            'start': state['start'],
        },
        candidate,
        fools(logits, slot['label']),
    )


def square(*, norm: str = 'linf', queries: int = 5000) -> Attack:
    """Returns the Square attack for `slots.run`, in 'linf' or 'l2': `queries` queries an image."""
    return Attack(_start, _step, queries, (('norm', norm), ('queries', queries)))
