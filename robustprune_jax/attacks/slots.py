"""Runs an attack on many images through one compiled batch: a slot frees when its image is done.

An attack is a per-image search of at most `steps` steps. Its images wait in a queue; each takes a
slot of the batch, and leaves when it fools the network, or after the last step. So the cost follows
the steps that images need, the batch keeps one shape, and nothing is compiled twice.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from robustprune_jax.attacks.pgd import per_image
from robustprune_jax.runtime import compiler
from robustprune_jax.runtime.sharding import make_mesh, replicated, shard_batch

# Steps between two looks at which images are done: the host waits for the device there.
STEPS_AT_ONCE = 5


class Attack(NamedTuple):
    """A search per image, as functions of a batch whose images may be at different steps.

    start(slot, eps, **settings) -> state; slot holds 'image' [B, H, W, C], and 'label', 'target'
    and 'key' [B]; state is any dict of arrays [B, ...].
    step(logits_fn, slot, age, state, eps, **settings) -> state, candidate [B, H, W, C] in the ball
    and in [0, 1], whether it fools [B]; age: [B], the steps done before.
    Both are module-level functions, and settings are hashable, so that equal attacks share code.
    """

    start: Callable
    step: Callable
    steps: int
    settings: tuple[tuple[str, object], ...]


def choose(mask: jax.Array, new, old):
    """Returns, in every leaf, the examples of `new` where mask [B] holds, else those of `old`."""
    return jax.tree.map(lambda n, o: jnp.where(per_image(mask, n), n, o), new, old)


def fools(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether another class than the label has the largest logit, [B]; NaN never fools."""
    return (jnp.argmax(logits, -1) != labels) & jnp.all(jnp.isfinite(logits), -1)


@compiler.jit
def _forward(logits_fn, images):
    return logits_fn(images)


def on_devices(logits_fn: Callable) -> Partial:
    """Returns `logits_fn` with its arrays on every device, else they move with every step."""
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    return jax.device_put(logits_fn, replicated(_mesh()))


@cache
def _mesh():
    """This process's devices: its images need nobody else's."""
    return make_mesh(jax.local_devices())


def on_all_devices(batch_size: int) -> int:
    """Returns the least multiple of the number of devices that holds a batch."""
    return math.ceil(batch_size / _mesh().size) * _mesh().size


def logits_of(logits_fn: Partial, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the logits [N, K] of images [N, H, W, C], in batches of one shape."""
    logits = []
    for first in range(0, len(images), batch_size):
        part = images[first : first + batch_size]
        padded = np.concatenate([part, np.repeat(part[:1], batch_size - len(part), axis=0)])
        batch = shard_batch(_mesh(), {'image': padded})
        logits.append(np.asarray(_forward(logits_fn, batch['image']))[: len(part)])
    return np.concatenate(logits)


def run(
    attack: Attack,
    logits_fn: Partial,
    key: jax.Array,
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    numbers: np.ndarray,
    *,
    eps: float,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [N, H, W, C], adversarial where one was found, and whether it was, bool [N].

    targets: int [N, T]: each image is attacked T times, with its targets in order, until one
    attack fools. An image's random numbers depend on `key` and its number, of numbers [N], only.
    """
    # Few images must not carry many empty slots; four sizes, so that little is compiled anew.
    part = on_all_devices(math.ceil(batch_size / 4))
    batch_size = min(batch_size, part * max(math.ceil(targets.size / part), 1))
    found, fooled = np.array(images), np.zeros(len(images), bool)
    per_image = targets.shape[1]
    # Jobs are numbered image by image; the first target of every image comes first.
    waiting = list(np.arange(targets.size).reshape(targets.shape).T.ravel()[::-1])
    jobs, age = np.full(batch_size, -1), np.zeros(batch_size, int)
    slot = progress = None
    while waiting or (jobs >= 0).any():
        jobs[(jobs >= 0) & fooled[jobs // per_image]] = -1
        fresh = np.zeros(batch_size, bool)
        for free in np.flatnonzero(jobs < 0):
            while waiting and fooled[waiting[-1] // per_image]:
                waiting.pop()
            if waiting:
                jobs[free], fresh[free] = waiting.pop(), True
        if (jobs < 0).all():
            break
        if fresh.any():
            image_of, target_of = np.divmod(np.maximum(jobs, 0), per_image)
            slot = {
                'image': images[image_of],
                'label': labels[image_of],
                'target': targets[image_of, target_of],
                'number': numbers[image_of] * per_image + target_of,
            }
            slot = _with_keys(key, shard_batch(_mesh(), slot))
            progress = _fill(attack.start, attack.settings, slot, progress, fresh, eps)
        left = attack.steps - np.where(fresh, 0, age)[jobs >= 0].min()
        progress = _advance_some(attack, min(STEPS_AT_ONCE, left), logits_fn, slot, progress, eps)
        age, broken = jax.device_get((progress['age'], progress['broken']))
        ready = np.flatnonzero(broken & (jobs >= 0))
        if len(ready):
            found[jobs[ready] // per_image] = np.asarray(progress['found'])[ready]
            fooled[jobs[ready] // per_image] = True
        jobs[age >= attack.steps] = -1
    return found, fooled


@jax.jit
def _with_keys(key, slot):
    return {**slot, 'key': jax.vmap(partial(jax.random.fold_in, key))(slot['number'])}


@partial(jax.jit, static_argnums=(0, 1))
def _fill(start, settings, slot, progress, fresh, eps):
    new = {
        'age': jnp.zeros(len(fresh), jnp.int32),
        'broken': jnp.zeros(len(fresh), bool),
        'found': slot['image'],
        'state': start(slot, eps, **dict(settings)),
    }
    return new if progress is None else choose(fresh, new, progress)


def _advance_some(attack, count, logits_fn, slot, progress, eps):
    if compiler.backend() == 'cpu':
        # Convolutions inside a loop body run 2.6 times slower on the CPU backend.
        for _ in range(count):
            progress = _advance(attack, logits_fn, slot, progress, eps)
        return progress
    return _advance_looped(attack, logits_fn, slot, progress, eps, count)


def _one_step(attack, logits_fn, slot, progress, eps):
    """Every slot goes on; what a slot finds beyond its attack's last step does not count."""
    age = progress['age']
    state, candidate, fooled = attack.step(
        logits_fn, slot, age, progress['state'], eps, **dict(attack.settings)
    )
    first = fooled & ~progress['broken'] & (age < attack.steps)
    return {
        'age': age + 1,
        'broken': progress['broken'] | first,
        'found': choose(first, candidate, progress['found']),
        'state': state,
    }


_advance = compiler.jit(_one_step, static_argnums=0, donate_argnums=3)


@compiler.jit(static_argnums=0, donate_argnums=3)
def _advance_looped(attack, logits_fn, slot, progress, eps, count):
    return jax.lax.fori_loop(
        0, count, lambda _, progress: _one_step(attack, logits_fn, slot, progress, eps), progress
    )
