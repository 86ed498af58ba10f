"""Properties of any kind as one question to `verify`: can a box reach an unsafe set of outputs?

A box is the ball of 0.5 around the middle of [0, 1]^N, stretched by an affine layer before the
network. A layer behind it has a logit 0, and one for each unsafe polyhedron {y: A y <= b}, the
least of b - A y: positive where y lies inside. Minima are relus, min(p, q) = p - relu(p - q), which
branch and bound splits like the network's own, so that what `verify` completes is complete here.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from robustprune_jax.bounds.verify import verify
from robustprune_jax.runtime import compiler

Polyhedron = tuple[np.ndarray, np.ndarray]  # A [S, K] and b [S]


class Answer(NamedTuple):
    """status: 'unsat' where no input is unsafe, 'sat' where one is, 'timeout' or 'unknown', in
    VNN-COMP's words; inputs [N], outputs [K]: of 'sat', that point; reason: of 'unknown'."""

    status: str
    inputs: np.ndarray | None = None
    outputs: np.ndarray | None = None
    reason: str = ''


@compiler.full_precision
def decide(
    logits_fn: Callable[[jax.Array], jax.Array],
    regions: Iterable[tuple[np.ndarray, np.ndarray, Sequence[Polyhedron]]],
    *,
    image_shape: Sequence[int],
    timeout: float = 120.0,
    sound: bool = True,
) -> Answer:
    """Returns whether the network has unsafe outputs in any of the regions.

    logits_fn: [B, *image_shape] -> [B, K]; regions: each the box [lower, upper] of inputs [N], in
    flat order, and the polyhedra (A [S, K], b [S]), float64, in which its outputs are unsafe: what
    conversion.read_vnnlib returns. timeout: seconds in all, after which nothing is split any more;
    what comes before, compilation too, is not interrupted.

    Boxes and b are rounded outward to float32, A to the nearest, then bounded as by `verify`. A
    point is unsafe where the network's float32 outputs are; it lies in the box as float32 reads it.
    sound: as of `verify`.
    Raises ValueError where a region does not fit the network; else as `verify`.
    """
    deadline = time.monotonic() + timeout
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    open_ = None
    for region in regions:
        _check(region, logits_fn, image_shape)
        if (left := deadline - time.monotonic()) <= 0:
            return Answer('timeout')
        answer = _decide(logits_fn, *region, tuple(image_shape), left, sound)
        if answer.status == 'sat':
            return answer
        if answer.status != 'unsat':
            open_ = answer
    return open_ or Answer('unsat')


def _check(region, logits_fn, image_shape):
    struct = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    network = [math.prod(image_shape), jax.eval_shape(logits_fn, struct).shape[-1]]
    found = [len(region[0]), region[2][0][0].shape[1]]
    if found != network:
        raise ValueError(
            f'the property has {found[0]} inputs and {found[1]} outputs: the network has '
            f'{network[0]} and {network[1]}'
        )


def _decide(logits_fn, lower, upper, unsafe, image_shape, timeout, sound) -> Answer:
    low = -_above(-lower)
    width = _above(upper - low.astype(np.float64))
    width = np.where(width > 0, np.nextafter(width, np.float32(np.inf)), 0)  # of the difference
    matrix = np.concatenate([a for a, _ in unsafe]).astype(np.float32)
    limits = _above(np.concatenate([b for _, b in unsafe]))
    ends = tuple(np.cumsum([len(b) for _, b in unsafe]).tolist())
    question = Partial(_posed(image_shape, ends), logits_fn, low, width, matrix, limits)
    middle = np.full((1, 1, 1, len(lower)), 0.5, np.float32)
    settings = {'timeout': timeout, 'sound': sound}
    (verdict,) = verify(question, middle, np.array([0]), eps=0.5, **settings)
    if verdict.status == 'verified':
        return Answer('unsat')
    if verdict.reason == 'timeout':
        return Answer('timeout')
    if verdict.status == 'undecided':
        return Answer('unknown', reason=verdict.reason)
    place = middle if verdict.adversarial is None else verdict.adversarial
    x = np.clip(low + width * place.ravel(), lower.astype(np.float32), upper.astype(np.float32))
    y = np.asarray(logits_fn(x.reshape(1, *image_shape)))[0]
    if any((a @ y <= b).all() for a, b in unsafe):
        return Answer('sat', x, y)
    return Answer('unknown', reason='a point is unsafe only to the rounding of float32')


def _above(values: np.ndarray) -> np.ndarray:
    """The least float32 that are not below float64 values."""
    near = values.astype(np.float32)
    return np.where(near < values, np.nextafter(near, np.float32(np.inf)), near)


@cache  # so that questions of one form share compiled code
def _posed(image_shape, ends):
    """Returns the question's logits [B, 1 + polyhedra] of places [B, 1, 1, N] in [0, 1]."""

    def logits(logits_fn, low, width, matrix, limits, places):
        x = low + width * places.reshape(len(places), -1)
        inside = limits - logits_fn(x.reshape(-1, *image_shape)) @ matrix.T
        minima = [
            reduce(_minimum, jnp.split(inside[:, start:end], end - start, axis=1))
            for start, end in zip((0, *ends), ends, strict=False)
        ]
        return jnp.concatenate([jnp.zeros((len(x), 1), x.dtype), *minima], axis=1)

    return logits


def _minimum(p, q):
    return p - jnp.maximum(p - q, 0)
