"""Randomized smoothing: certified radii in l_2 (Cohen, Rosenfeld & Kolter 2019), in their names.

    labels, radii = certify(logits_fn, key, images, sigma=0.25, batch_size=256, num_classes=10)

The smoothed classifier g(x) is the class that the network gives most often to x + sigma * noise.
`logits_fn` maps images [B, H, W, C] to logits [B, K]. A `jax.tree_util.Partial(apply, variables)`
keeps weights out of the compiled program; a plain callable is wrapped. Images lie in [0, 1], sigma
and radii are in pixel units, and the noisy images are not clipped.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from scipy.stats import beta, binomtest, norm

from robustprune_jax.runtime import compiler, inputs
from robustprune_jax.runtime.sharding import check_batch_size, make_mesh, replicated

ABSTAIN = -1


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
    return np.where(certified, cAHat, ABSTAIN), np.where(certified, sigma * norm.ppf(pABar), 0.0)


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
    p_values = [binomtest(a, a + b, 0.5).pvalue for a, b in zip(nA, nB, strict=True)]
    return np.where(np.array(p_values) <= alpha, labels, ABSTAIN)


def lower_confidence_bound(k: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Returns the one-sided (1 - alpha) Clopper-Pearson bound on p from k ~ Binomial(n, p)."""
    return np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)


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


@compiler.jit
def _count(counts, logits_fn, key, images, sigma, rows, image, copy, n0, n, first):
    """counts [B, 2, K] plus the predictions for one batch of noisy copies.

    rows: 0, 1, ... [batch_size], over the devices; row 0 is copy number `copy` of image number
    `image`, and when an image has its n0 + n copies the next one follows.
    """
    copy = copy + rows
    image, copy = image + copy // (n0 + n), copy % (n0 + n)

    def noise(image, copy):
        copy_key = jax.random.fold_in(jax.random.fold_in(key, first + image), copy)
        return jax.random.normal(copy_key, images.shape[1:], images.dtype)

    noisy = images.at[image].get(mode='clip') + sigma * jax.vmap(noise)(image, copy)
    logits = logits_fn(noisy)
    if logits.shape[-1] != counts.shape[-1]:
        raise ValueError(
            f'num_classes is {counts.shape[-1]}: the network has {logits.shape[-1]} classes'
        )
    chosen = (image, (copy >= n0).astype(jnp.int32), jnp.argmax(logits, axis=-1))
    # The rows after the last image are dropped.
    return jax.lax.with_sharding_constraint(
        counts.at[chosen].add(1, mode='drop'), replicated(make_mesh())
    )
