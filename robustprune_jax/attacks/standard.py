"""The ensemble by which the field ranks defences: AutoAttack (Croce & Hein 2020)."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from robustprune_jax.attacks.apgd import apgd
from robustprune_jax.attacks.fab import fab
from robustprune_jax.attacks.pgd import cross_entropy
from robustprune_jax.attacks.slots import (
    Attack,
    logits_of,
    on_all_devices,
    on_devices,
    run,
)
from robustprune_jax.attacks.square import square
from robustprune_jax.runtime import compiler, inputs
from robustprune_jax.runtime.registry import lookup


class Entry(NamedTuple):
    """An attack of the ensemble."""

    make: Callable[..., Attack]  # of a norm, and of samples where it has gradients of draws
    classes: int  # that the network has at least
    targets: int = 0  # at most; 0: any wrong class
    draws: bool = False  # whether it takes networks that are random
    gradients: bool = True  # whether it asks for more than logits


ATTACKS: dict[str, Entry] = {
    'apgd-ce': Entry(apgd, 2, draws=True),
    'apgd-dlr': Entry(partial(apgd, loss='dlr'), 3, draws=True),
    'apgd-t': Entry(partial(apgd, loss='dlr_targeted'), 4, 9, True),
    'fab-t': Entry(fab, 2, 9),
    'square': Entry(square, 2, gradients=False),
    # Those of FAST, by their steps, targets and queries.
    'apgd-ce-50': Entry(partial(apgd, steps=50), 2, draws=True),
    'apgd-t-50x3': Entry(partial(apgd, loss='dlr_targeted', steps=50), 4, 3, True),
    'square-500': Entry(partial(square, queries=500), 2, gradients=False),
}
BALLS = ('linf', 'l2')  # the norms of the ensemble's attacks
STANDARD = ('apgd-ce', 'apgd-t', 'fab-t', 'square')
FAST = ('apgd-ce-50', 'apgd-t-50x3', 'square-500')
RAND = ('apgd-ce', 'apgd-dlr')
ENSEMBLES = {'standard': STANDARD, 'fast': FAST}  # of networks that are not random

TINY_STEP = 1e-3  # of eps: a random step of that size should reverse next to no prediction
REVERSED = 0.02  # part of the images whose prediction it may reverse without a warning


def standard(
    logits_fn: Callable[..., jax.Array],
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: float,
    norm: str = 'linf',
    attacks: tuple[str, ...] = STANDARD,
    samples: int = 0,
    batch_size: int = 128,
) -> tuple[np.ndarray, dict[str, float]]:
    """Returns adversarial images, and the accuracy that is left after each attack.

    AutoAttack's standard version: APGD on cross-entropy (100 steps), targeted APGD and FAB-T (100
    steps at each of the 9 likeliest wrong classes), Square (5,000 queries), one run each, every
    attack on the images that still stand. Its version for networks that are random: attacks=RAND
    (APGD on cross-entropy and on the difference of logits ratio), samples=20. With a tenth of the
    budget, not AutoAttack's: attacks=FAST (APGD on cross-entropy, and targeted at 3 classes, 50
    steps each; Square, 500 queries).

    images: [N, H, W, C] in [0, 1], any number; labels: [N] ints; eps in pixel units, in `norm`
    ('linf' or 'l2'). attacks: names of ATTACKS, in order. samples: above 0, the network is random,
    logits_fn(key, images), every gradient is the mean of so many draws, and one more draw says
    whether an image is misclassified. batch_size: images in one compiled batch, which is split over
    the devices of this process.
    The images returned are float32 [N, H, W, C] within eps and in [0, 1]: misclassified where one
    was found, otherwise the clean image. The accuracies are of 'clean' and of each attack.

    Raises ValueError on settings or images without meaning, on logits that are not finite, and on
    fewer classes than a loss needs. Warns (UserWarning) where the result is not to be trusted: the
    network is random without samples, gradients are zero, outputs are probabilities, a tiny random
    step changes predictions, or Square breaks what gradients did not. Not for use in `jit`. The
    network should be in eval mode.
    """
    adversarial, broken_by = in_order(
        logits_fn,
        key,
        images,
        labels,
        eps=eps,
        norm=norm,
        attacks=attacks,
        samples=samples,
        batch_size=batch_size,
    )
    return adversarial, accuracy_after(broken_by, attacks)


def accuracy_after(broken_by: np.ndarray, attacks: tuple[str, ...] = STANDARD) -> dict[str, float]:
    """Returns the accuracy after 'clean' and each attack, from the names that `in_order` gives."""
    order = ('clean', *attacks)
    return {
        name: float(np.mean(~np.isin(broken_by, order[: i + 1]))) for i, name in enumerate(order)
    }


@compiler.full_precision
def in_order(
    logits_fn: Callable[..., jax.Array],
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: float,
    norm: str = 'linf',
    attacks: tuple[str, ...] = STANDARD,
    samples: int = 0,
    batch_size: int = 128,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns adversarial images, and the name of what broke each image, str [N].

    The name is an attack's, 'clean' where the image itself is misclassified, '' where it stands.
    first: the number of images[0] in its data set: an image's random numbers depend on `key` and
    its number. Other arguments, images, errors and warnings are those of `standard`.
    """
    _check_settings(norm, attacks, samples, batch_size)
    inputs.check(images, labels, eps=eps, norm=norm)
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    batch_size, logits_fn = on_all_devices(batch_size), on_devices(logits_fn)

    def drawn(number):
        return Partial(logits_fn, jax.random.fold_in(key, number)) if samples else logits_fn

    clean = drawn(len(attacks))
    logits = logits_of(clean, images, batch_size)
    _check_logits(logits, labels, attacks)
    _warn(clean, key, images, labels, logits, eps, attacks, batch_size)
    adversarial = images.copy()
    broken_by = np.where(logits.argmax(-1) == labels, '', 'clean').astype(object)
    settings = {'norm': norm, 'samples': samples} if samples else {'norm': norm}
    for i, name in enumerate(attacks):
        index = np.flatnonzero(broken_by == '')
        found, fooled = run(
            ATTACKS[name].make(**settings),
            logits_fn,
            jax.random.fold_in(key, i),
            images[index],
            labels[index],
            _targets(ATTACKS[name].targets, logits[index], labels[index]),
            first + index,
            eps=eps,
            batch_size=batch_size,
        )
        if not fooled.any():
            continue
        index, found = index[fooled], found[fooled]
        # The attack's own forward pass is another program, whose rounding may differ.
        predicted = logits_of(drawn(len(attacks) + 1 + i), found, batch_size).argmax(-1)
        wrong = predicted != labels[index]
        adversarial[index[wrong]] = found[wrong]
        broken_by[index[wrong]] = name
    scores = [name for name in attacks if not ATTACKS[name].gradients]
    by_scores = np.isin(broken_by, scores).sum()
    if by_scores and attacks[0] not in scores:
        _doubt(f'Square broke {by_scores} images that attacks by gradient did not')
    return adversarial, broken_by.astype(str)


def _targets(count, logits, labels):
    """The likeliest wrong classes [N, count]; count 0, an attack without targets: one of no use."""
    if not count:
        return np.zeros((len(labels), 1), int)
    own = np.arange(logits.shape[-1]) == labels[:, None]
    return np.argsort(np.where(own, np.inf, -logits), axis=-1)[:, :-1][:, :count]


def _check_settings(norm, attacks, samples, batch_size):
    lookup(dict.fromkeys(BALLS), norm, 'norm')
    for name in attacks:
        entry = lookup(ATTACKS, name, 'attack')
        if samples and not entry.draws:
            raise ValueError(f'{name} does not take samples: choose attacks={RAND}')
    if batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}: expected at least 1')


def _check_logits(logits, labels, attacks):
    classes = logits.shape[-1]
    bad = ~np.isfinite(logits).all(-1)
    if bad.any():
        raise ValueError(f'the logits of image {bad.argmax()} are not finite')
    inputs.check_classes(labels, classes)
    for name in attacks:
        needed = ATTACKS[name].classes
        if classes < needed:
            raise ValueError(
                f'{name} needs at least {needed} classes, the network has {classes}: choose '
                "attacks=('apgd-ce', 'fab-t', 'square')"
            )


@jax.jit
def _gradients(logits_fn, images, labels):
    return jax.grad(lambda x: jnp.sum(cross_entropy(logits_fn(x), labels)))(images)


def _doubt(message):
    warnings.warn(f'the accuracy may be too high or too low: {message}', stacklevel=5)


def _warn(logits_fn, key, images, labels, logits, eps, attacks, batch_size):
    """Warns of what makes the result doubtful, after a look at the first batch."""
    images, labels, logits = images[:batch_size], labels[:batch_size], logits[:batch_size]
    again = logits_of(logits_fn, images, batch_size)
    if not np.allclose(again, logits, rtol=1e-6, atol=1e-6):
        _doubt(
            'the network is random, it gave the same images two different outputs: pass it as '
            'logits_fn(key, images), with attacks=RAND and samples=20'
        )
    right = logits.argmax(-1) == labels
    # Within the ball of either norm, and of no meaning to a network that is continuous.
    signs = np.asarray(jax.random.rademacher(key, images.shape, np.float32))
    step = TINY_STEP * eps / math.sqrt(images[0].size) * signs
    moved = logits_of(logits_fn, np.clip(images + step, 0, 1), batch_size)
    reversed_ = right & (moved.argmax(-1) != labels)
    if np.mean(reversed_) > REVERSED:
        _doubt(
            f'a random step of {TINY_STEP:g} eps reverses {reversed_.sum()} of {right.sum()} right '
            'predictions: the network is not continuous'
        )
    if any(ATTACKS[name].gradients for name in attacks):
        zero = ~np.any(_gradients(logits_fn, images, labels), axis=(1, 2, 3))
        if zero.any():
            _doubt(
                f'{zero.sum()} of {len(images)} images have a zero gradient (of cross-entropy): '
                'attacks by gradient may fail there'
            )
    if logits.min() >= 0 and np.allclose(logits.sum(-1), 1, atol=1e-4):
        _doubt('the outputs look like probabilities: the losses need logits')
