"""What the library's functions refuse, in the same words everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax.attacks import pgd, standard
from robustprune_jax.bounds import margins
from robustprune_jax.smoothing import certify, predict

KEY = jax.random.key(0)
WEIGHTS = np.random.default_rng(0).normal(size=(192, 3)).astype(np.float32)
NETWORK = Partial(lambda w, x: x.reshape(len(x), -1) @ w, WEIGHTS)
IMAGES = np.random.default_rng(1).random((4, 8, 8, 3), np.float32)
LABELS = np.arange(4) % 3

ATTACKED = {
    'pgd': lambda x, y, eps: pgd(NETWORK, KEY, x, y, eps=eps, step_size=0.01, steps=1),
    'standard': lambda x, y, eps: standard(NETWORK, KEY, x, y, eps=eps, attacks=('apgd-ce',)),
    'margins': lambda x, y, eps: margins(NETWORK, x, y, eps=eps),
}
SMOOTHED = {
    name: lambda x, y, eps, f=f: f(NETWORK, KEY, x, sigma=0.1, n=10, batch_size=8, num_classes=3)
    for name, f in (('certify', certify), ('predict', predict))
}
OF_IMAGES = [
    ({'x': IMAGES * 255}, r'images have values from .* to 25.*: expected \[0, 1\] \(0\.\.255\?'),
    ({'x': IMAGES - 0.5}, r'images have values from -0\.\d+ to .*: expected \[0, 1\]$'),
    ({'x': np.full_like(IMAGES, np.nan)}, 'images have values from nan'),
    ({'x': (IMAGES * 255).astype(np.uint8)}, r'images are uint8: expected floats in \[0, 1\]'),
    ({'x': IMAGES.transpose(0, 3, 1, 2)}, r'\[4, 3, 8, 8\], which looks NCHW'),
    ({'x': IMAGES[0]}, r'images have shape \[8, 8, 3\]: expected \[B, H, W, C\]'),
    ({'x': IMAGES[:0], 'y': LABELS[:0]}, r'images have shape \[0, 8, 8, 3\]'),
    ({'x': IMAGES.tolist()}, 'images are a list: expected an array'),
]
OF_BALLS = [
    ({'y': np.eye(3)[LABELS]}, r'labels are float64 \[4, 3\]: expected ints \[4\] \(one-hot'),
    ({'y': LABELS.astype(np.float32)}, r'labels are float32 \[4\]: expected ints \[4\]$'),
    ({'y': LABELS[:3]}, r'labels are int64 \[3\]: expected ints \[4\]'),
    ({'y': np.array([0, 1, 2, 10])}, 'label of image 3 is 10: the network has classes 0 to 2'),
    ({'y': np.array([0, -1, 2, 1])}, 'label of image 1 is -1'),
    ({'eps': 8}, r'eps is 8: expected a radius from 0 to 1 in linf, in pixel units \(8/255\?\)'),
    ({'eps': -0.1}, 'eps is -0.1'),
    ({'eps': np.nan}, 'eps is nan'),
]


@pytest.mark.parametrize(
    ('function', 'wrong', 'message'),
    [
        (function, wrong, message)
        for functions, cases in ((ATTACKED | SMOOTHED, OF_IMAGES), (ATTACKED, OF_BALLS))
        for function in functions.values()
        for wrong, message in cases
    ],
)
def test_images_labels_and_eps_that_are_no_such_thing_are_refused(function, wrong, message):
    given = {'x': IMAGES, 'y': LABELS, 'eps': 0.1, **wrong}
    with pytest.raises(ValueError, match=message) as error:
        function(**given)
    assert '\n' not in str(error.value)


def test_a_network_that_ends_in_a_softmax_brings_a_warning():
    probabilities = Partial(lambda w, x: jax.nn.softmax(NETWORK.func(w, x)), WEIGHTS)
    with pytest.warns(UserWarning, match='ends in a softmax'):
        pgd(probabilities, KEY, IMAGES, LABELS, eps=0.1, step_size=0.01, steps=1)


def test_a_network_that_ignores_its_images_is_attacked_all_the_same():
    constant = Partial(lambda w, x: jnp.tile(w[0], (len(x), 1)), WEIGHTS)
    attacked = pgd(constant, KEY, IMAGES, LABELS, eps=0.1, step_size=0.01, steps=1)
    assert np.abs(attacked - IMAGES).max() <= 0.1 + 1e-6


def test_labels_of_any_integer_type_will_do():
    settings = {'eps': 0.1, 'step_size': 0.05, 'steps': 3}
    attacked = pgd(NETWORK, KEY, IMAGES, LABELS.astype(np.int32), **settings)
    bounds = margins(NETWORK, IMAGES, LABELS.astype(np.int32), eps=0.1)
    for dtype in (np.uint8, np.int64):
        labels = LABELS.astype(dtype)
        np.testing.assert_array_equal(pgd(NETWORK, KEY, IMAGES, labels, **settings), attacked)
        np.testing.assert_array_equal(margins(NETWORK, IMAGES, labels, eps=0.1), bounds)


@pytest.mark.parametrize('function', ATTACKED.values(), ids=ATTACKED)
def test_an_empty_ball_holds_the_image_alone(function):
    """eps 0: nothing moves, and accuracy under attack is clean accuracy."""
    labels = np.argmax(NETWORK(IMAGES), -1)
    found = function(IMAGES, labels, 0.0)
    if isinstance(found, tuple):
        found, accuracy = found
        assert set(accuracy.values()) == {1.0}
    if found.shape == IMAGES.shape:
        np.testing.assert_array_equal(found, IMAGES)


def test_a_half_precision_network_falls_to_fab():
    """The search for the boundary ended in a TypeError."""
    half = Partial(lambda w, x: NETWORK.func(w, x.astype(w.dtype)), WEIGHTS.astype(jnp.bfloat16))
    labels = np.argmax(half(IMAGES), -1)
    settings = {'eps': 1.0, 'norm': 'l2', 'attacks': ('fab-t',), 'batch_size': 4}
    found, accuracy = standard(half, KEY, IMAGES, labels, **settings)
    assert accuracy['fab-t'] < accuracy['clean'] == 1
    assert np.linalg.norm((found - IMAGES).reshape(4, -1), axis=1).max() <= 1 + 1e-5


def test_half_precision_networks_are_attacked_and_bounded():
    for dtype in (jnp.bfloat16, jnp.float16):
        network = Partial(NETWORK.func, WEIGHTS.astype(dtype))
        half = Partial(lambda w, x: NETWORK.func(w, x.astype(w.dtype)), WEIGHTS.astype(dtype))
        for logits_fn in (network, half):
            attacked = pgd(logits_fn, KEY, IMAGES, LABELS, eps=0.1, step_size=0.05, steps=3)
            assert np.abs(attacked - IMAGES).max() <= 0.1 + 1e-6
            logits = np.asarray(logits_fn(attacked), np.float32)
            right = logits[np.arange(4), LABELS][:, None]
            lower = np.asarray(margins(logits_fn, IMAGES, LABELS, eps=0.1), np.float32)
            tolerance = 2 * jnp.finfo(dtype).eps * np.abs(logits).max()
            assert (lower <= right - logits + tolerance).all()
