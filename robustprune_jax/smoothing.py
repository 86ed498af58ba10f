"""Randomized smoothing: certified radii in l_2 (Cohen, Rosenfeld & Kolter 2019), in their names.

    labels, radii = certify(logits_fn, key, images, sigma=0.25, batch_size=256, num_classes=10)
    labels, radii, draws = certify_anytime(..., wanted=(0.25, 0.5))  # stops when these are decided

The smoothed classifier g(x) is the class that the network gives most often to x + sigma * noise.
`logits_fn` maps images [B, H, W, C] to logits [B, K]. A `jax.tree_util.Partial(apply, variables)`
keeps weights out of the compiled program; a plain callable is wrapped. Images lie in [0, 1], sigma
and radii are in pixel units, and the noisy images are not clipped.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from scipy.special import bdtr, betaincinv, betaln, ndtr, ndtri, xlog1py, xlogy

from robustprune_jax.runtime import compiler, inputs
from robustprune_jax.runtime.sharding import check_batch_size, make_mesh, replicated

ABSTAIN = -1
LOOK = 100  # draws between two looks at whether an image is decided


@compiler.full_precision
def certify(
    logits_fn: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int,
    num_classes: int,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns g's classes, int [B], and the l_2 radii within which they hold, float [B].

    The paper's CERTIFY: n0 noisy copies of an image choose a class, n others bound its probability
    from below. With probability at least 1 - alpha, for each image, g is that class at any distance
    below the radius; where the bound is not above 1/2 the class is ABSTAIN and the radius 0.

    batch_size: noisy images in one forward pass, any number; the copies of all images are packed
    together. first: the number of images[0] in its data set: an image's noise depends on `key` and
    its number, not on batch_size or the other images. Raises ValueError on settings without
    meaning, MemoryError when batch_size is too large.
    """
    _check(sigma=sigma, n0=n0, n=n, alpha=alpha)
    counts0, counts = _sample_under_noise(
        logits_fn, key, images, sigma, n0, n, batch_size, num_classes, first
    )
    cAHat = np.argmax(counts0, axis=1)
    nA = counts[np.arange(len(counts)), cAHat]
    pABar = lower_confidence_bound(nA, n, alpha)
    certified = pABar > 0.5
    return np.where(certified, cAHat, ABSTAIN), np.where(certified, sigma * ndtri(pABar), 0.0)


@compiler.full_precision
def certify_anytime(
    logits_fn: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: float,
    wanted: Sequence[float],
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int,
    num_classes: int,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns certify's classes and radii [B], and how many noisy copies were counted, int [B].

    An image's draws end as soon as each of the wanted radii, in pixel units, is decided: certified,
    excluded, or out of reach of the n draws that there are at most. A confidence sequence (Voracek
    2024) bounds the class's probability at every number of draws at once, so the certificates of an
    image, at all radii, are wrong with probability at most alpha whenever they stop. Radii beyond
    the largest wanted one come out lower than certify's.

    Looks are every LOOK draws of an image, whatever the batch; images that are done leave it. What
    comes out depends on `key` and the image's number only. The other arguments, and errors, are
    certify's.
    """
    wanted = np.sort(np.asarray(wanted, float))
    _check(sigma=sigma, n0=n0, n=n, alpha=alpha)
    if not len(wanted) or wanted[0] < 0:
        raise ValueError(f'wanted is {wanted}: expected radii of at least 0, one or more')
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    counts0, _ = _sample_under_noise(
        logits_fn, key, images, sigma, n0, 0, batch_size, num_classes, first
    )
    cAHat = np.argmax(counts0, axis=1)
    placed = jax.device_put((images, cAHat), replicated(make_mesh()))

    def is_hit(image, copy):
        return _hits(logits_fn, key, *placed, sigma, image, n0 + copy, first, batch_size)

    nA, draws, certified = _until_decided(
        is_hit, len(images), ndtr(wanted / sigma), n, alpha, batch_size
    )
    radii = np.maximum(sigma * ndtri(np.maximum(anytime_bound(nA, draws, alpha), 0.5)), 0.0)
    # A wanted radius stays certified, though the evidence for it may have shrunk since.
    radii = np.maximum(radii, np.max(certified * wanted, axis=1))
    holds = (radii > 0) | certified.any(axis=1)
    return np.where(holds, cAHat, ABSTAIN), radii, draws


@compiler.full_precision
def predict(
    logits_fn: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: float,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int,
    num_classes: int,
    first: int = 0,
) -> np.ndarray:
    """Returns g's classes, int [B], each right with probability at least 1 - alpha, or ABSTAIN.

    The paper's PREDICT, on n noisy copies of each image. Arguments and errors are certify's.
    """
    _check(sigma=sigma, n=n, alpha=alpha)
    _, counts = _sample_under_noise(
        logits_fn, key, images, sigma, 0, n, batch_size, num_classes, first
    )
    labels = np.argmax(counts, axis=1)
    nB, nA = np.sort(counts, axis=1)[:, -2:].T
    p_values = np.minimum(2 * bdtr(nB, nA + nB, 0.5), 1)  # of the two-sided test of a fair coin
    return np.where(p_values <= alpha, labels, ABSTAIN)


def lower_confidence_bound(k: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Returns the one-sided (1 - alpha) Clopper-Pearson bound on p from k ~ Binomial(n, p)."""
    return np.where(k > 0, betaincinv(np.maximum(k, 1), n - k + 1, alpha), 0.0)


def anytime_evidence(p: np.ndarray, k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the evidence against p after k hits in n draws; arrays broadcast.

    It is that of a Beta(1/2, 1/2) mixture's likelihood over p's: a martingale of mean 1 where p is
    the truth, so it ever exceeds 1 / alpha with probability at most alpha (Ville).
    """
    mixture = betaln(k + 0.5, n - k + 0.5) - betaln(0.5, 0.5)
    return mixture - xlogy(k, p) - xlog1py(n - k, -p)


def anytime_bound(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    """Returns the lower bound on p after k hits in n draws that holds, with probability 1 - alpha,
    for all n at once: where anytime_evidence, below k / n, is ln(1 / alpha); 0 where there is none.
    """
    below, above = np.zeros(np.shape(k)), k / n
    for _ in range(60):
        middle = (below + above) / 2
        is_excluded = anytime_evidence(middle, k, n) >= -math.log(alpha)
        below, above = np.where(is_excluded, middle, below), np.where(is_excluded, above, middle)
    return below


def log_soft_vote(logits_fn: Callable, noise: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the logarithm of the mean softmax [B, K] over images + noise; noise: [m, B, H, W, C].

    It is finite also where float32 would round the mean to 0.
    """
    noisy = (images + noise).reshape(-1, *images.shape[1:])
    votes = jax.nn.log_softmax(logits_fn(noisy)).reshape(len(noise), len(images), -1)
    return jax.nn.logsumexp(votes, axis=0) - jnp.log(len(noise))


@compiler.full_precision
@partial(jax.jit, static_argnames='samples')
def soft_radii(
    logits_fn: Callable,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    sigma: float,
    samples: int = 10,
) -> jax.Array:
    """Returns an estimate, without confidence, of each image's certified radius [B].

    It is sigma * ppf of the label's mean softmax, and 0 where that is not above 1/2: a quick
    measure of training. Below 5.2 sigma, what a probability of 1 - 1e-7 gives.
    """
    noise = sigma * jax.random.normal(key, (samples, *images.shape), images.dtype)
    votes = log_soft_vote(logits_fn, noise, images)
    right = jnp.exp(jnp.take_along_axis(votes, labels[:, None], axis=1)[:, 0])
    return sigma * jax.scipy.stats.norm.ppf(jnp.clip(right, 0.5, 1 - 1e-7))


def _check(**settings):
    for name, value in settings.items():
        ok, expected = {
            'sigma': (value > 0, 'more than 0, in pixel units'),
            'alpha': (0 < value < 1, 'between 0 and 1'),
        }.get(name, (value >= 1, 'at least 1'))
        if not ok:
            raise ValueError(f'{name} is {value!r}: expected {expected}')


def _sample_under_noise(
    logits_fn, key, images, sigma, n0, n, batch_size, num_classes, first
) -> tuple[np.ndarray, np.ndarray]:
    """How often each class is predicted among the first n0 noisy copies and the n others of each
    image: two of [B, num_classes]."""
    inputs.check(images)
    check_batch_size(batch_size, 'batch_size')
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    mesh = make_mesh()
    counts = jnp.zeros((len(images), 2, num_classes), jnp.int32)
    images, counts = jax.device_put((images, counts), replicated(mesh))
    rows = jax.device_put(
        np.arange(batch_size, dtype=np.int32), NamedSharding(mesh, PartitionSpec('data'))
    )
    try:
        # A loop on the host, that never waits for the device: on the CPU backend convolutions run
        # 2.6 times slower inside a compiled loop.
        for row in range(0, len(images) * (n0 + n), batch_size):
            image, copy = divmod(row, n0 + n)
            counts = _count(counts, logits_fn, key, images, sigma, rows, image, copy, n0, n, first)
        counts = np.asarray(counts)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise MemoryError(
            f'{batch_size} noisy images do not fit into memory: lower batch_size'
        ) from error
    return counts[:, 0], counts[:, 1]


def _until_decided(is_hit, count, p, n, alpha, batch_size):
    """Hits and draws [count] of images when every p [R] was decided for them, or at n, and which p
    were certified by then [count, R].

    is_hit: (image, copy) -> bool, of int arrays [rows].
    """
    hits, draws = np.zeros(count, int), np.zeros(count, int)
    certified, settled = np.zeros((2, count, len(p)), bool)
    active, drawn = np.arange(count), 0
    while len(active) and drawn < n:
        looks = max(1, batch_size // (LOOK * len(active)))  # several, where one would not fill it
        drawing = min(looks * LOOK, n - drawn)
        image, copy = np.meshgrid(active, drawn + np.arange(drawing), indexing='ij')
        right = is_hit(image.ravel(), copy.ravel()).reshape(image.shape)
        ends = np.minimum(np.arange(drawn, drawn + drawing, LOOK) + LOOK, n)
        counted = hits[active, None] + np.cumsum(right, axis=1)[:, ends - drawn - 1]
        found = _decided(counted, ends, p, n, alpha)
        found |= np.stack([certified, settled])[:, active, None]
        found = np.logical_or.accumulate(found, axis=2)
        done = found[1].all(axis=-1)
        at = np.where(done.any(axis=1), done.argmax(axis=1), len(ends) - 1)
        rows = np.arange(len(active))
        hits[active], draws[active] = counted[rows, at], ends[at]
        certified[active], settled[active] = found[:, rows, at]
        active, drawn = active[~done.any(axis=1)], drawn + drawing
    return hits, draws, certified


def _decided(k, n, p, most, alpha):
    """Which p [R] are certified, and which decided, after k [B, looks] hits in n [looks] draws of
    at most `most`: [2, B, looks, R]."""
    enough, k, n = -math.log(alpha), k[..., None], n[:, None]
    has_evidence = anytime_evidence(p, k, n) >= enough
    at_best = k + most - n  # if all draws that are left were hits
    in_reach = (anytime_evidence(p, at_best, most) >= enough) & (at_best > p * most)
    certified = has_evidence & (k > p * n)
    return np.stack([certified, has_evidence | ~in_reach])


def _hits(logits_fn, key, images, classes, sigma, image, copy, first, batch_size) -> np.ndarray:
    """Whether noisy copy number copy[r] of image number image[r] is given its class, [rows]."""
    batches = -(-len(image) // batch_size)
    padded = np.zeros((2, batches * batch_size), np.int32)
    padded[:, : len(image)] = image, copy
    rows = NamedSharding(make_mesh(), PartitionSpec(None, 'data'))
    found = []  # no wait for the device before all are under way
    for batch in np.split(padded, batches, axis=1):
        placed = jax.device_put(batch, rows)
        found.append(_hit(logits_fn, key, images, classes, sigma, placed, first))
    return np.concatenate(jax.device_get(found))[: len(image)]


@compiler.jit
def _hit(logits_fn, key, images, classes, sigma, rows, first):
    image, copy = rows
    logits = logits_fn(_noisy(key, images, sigma, image, copy, first))
    is_hit = jnp.argmax(logits, axis=-1) == classes[image]
    return jax.lax.with_sharding_constraint(is_hit, replicated(make_mesh()))


def _noisy(key, images, sigma, image, copy, first):
    """Noisy copies number `copy` of images number `image`, [rows, H, W, C]."""

    def noise(image, copy):
        copy_key = jax.random.fold_in(jax.random.fold_in(key, first + image), copy)
        return jax.random.normal(copy_key, images.shape[1:], images.dtype)

    return images.at[image].get(mode='clip') + sigma * jax.vmap(noise)(image, copy)


@compiler.jit
def _count(counts, logits_fn, key, images, sigma, rows, image, copy, n0, n, first):
    """counts [B, 2, K] plus the predictions for one batch of noisy copies.

    rows: 0, 1, ... [batch_size], over the devices; row 0 is copy number `copy` of image number
    `image`, and when an image has its n0 + n copies the next one follows.
    """
    copy = copy + rows
    image, copy = image + copy // (n0 + n), copy % (n0 + n)
    logits = logits_fn(_noisy(key, images, sigma, image, copy, first))
    if logits.shape[-1] != counts.shape[-1]:
        raise ValueError(
            f'num_classes is {counts.shape[-1]}: the network has {logits.shape[-1]} classes'
        )
    chosen = (image, (copy >= n0).astype(jnp.int32), jnp.argmax(logits, axis=-1))
    # The rows after the last image are dropped.
    return jax.lax.with_sharding_constraint(
        counts.at[chosen].add(1, mode='drop'), replicated(make_mesh())
    )
