"""Sound bounds, by exact rationals: where float32 proves what is false they do not."""

from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from networks import random_relu_network

from robustprune_jax.bounds import METHODS, margins, verify

exact = np.vectorize(Fraction, otypes=[object])
THIRD, LARGE = np.float32(1 / 3), 2.0**20  # in float32, 3 * THIRD rounds to 1


def cancelling(x):
    """Logits LARGE (x0 - 3 (THIRD x0)) + 0.01 + relu(x1 - 0.5) and 0, written as layers."""
    x = x.reshape(len(x), -1)
    hidden = jax.nn.relu(x @ jnp.array([[1, THIRD, 0], [0, 0, 1]]) - jnp.array([0, 0, 0.5]))
    return hidden @ jnp.array([[LARGE, 0], [-3 * LARGE, 0], [1, 0]]) + jnp.array([0.01, 0])


def least_margin_of_cancelling(x0):
    slope = 1 - 3 * Fraction(float(THIRD))
    return Fraction(LARGE) * slope * Fraction(float(x0)) + Fraction(float(np.float32(0.01)))


@pytest.mark.parametrize('method', METHODS)
def test_large_terms_that_cancel_prove_nothing(method):
    images, labels = jnp.array([1, 0.3]).reshape(1, 1, 1, 2), jnp.zeros(1, int)
    assert least_margin_of_cancelling(1) < -0.01
    settings = {'eps': 0.0, 'method': method}
    assert margins(cancelling, images, labels, **settings)[0, 1] > 0
    assert margins(cancelling, images, labels, **settings, sound=True)[0, 1] < -0.01


def test_branching_proves_nothing_false():
    images, labels = np.float32([1, 0.5]).reshape(1, 1, 1, 2), np.zeros(1, int)
    assert least_margin_of_cancelling(0.9) < -0.01
    (plain,) = verify(cancelling, images, labels, eps=0.1, timeout=20, sound=False)
    (sound,) = verify(cancelling, images, labels, eps=0.1, timeout=20)
    assert (plain.status, sound.status) == ('verified', 'undecided')


def exact_logits(weights, image):
    z = exact(np.ravel(image).astype(float))
    for i, (w, b) in enumerate(weights):
        z = z @ exact(np.asarray(w, float)) + exact(np.asarray(b, float))
        z = np.maximum(z, 0) if i < len(weights) - 1 else z
    return z


@pytest.mark.parametrize('method', METHODS)
def test_at_a_point_sound_bounds_are_below_the_exact_margins(method):
    network, images = random_relu_network(jax.random.key(0), (8, 16, 16, 6), 12)
    labels = jnp.zeros(12, int)
    margin = [exact_logits(network.args[0], image) for image in images]
    margin = np.array([logits[0] - logits for logits in margin])
    plain = exact(np.asarray(margins(network, images, labels, eps=0.0, method=method), float))
    sound = margins(network, images, labels, eps=0.0, method=method, sound=True)
    sound = exact(np.asarray(sound, float))
    assert (plain > margin).any()  # so that the rest says something
    assert (sound <= margin).all()
    assert (margin - sound < 1e-3).all()


@pytest.mark.parametrize('method', ['ibp', 'crown', 'symbolic'])
def test_lines_above_relu_are_above_it(method):
    """-relu(w x + b) is least at an end of the ball, where the chord ends: its bound is exact."""
    rng = np.random.default_rng(0)
    x, w, b = rng.uniform(0.2, 0.8, 64), rng.normal(0, 2, 64), rng.normal(0, 1, 64)
    x, w, b = (np.float32(value) for value in (x, w, b - w * x / 2))
    network = Partial(lambda w, b, x: -jax.nn.relu(w * x.reshape(1, -1) + b), w, b)
    images, spec, eps = x.reshape(1, 1, 1, 64), jnp.eye(64), np.float32(0.125)
    w, b, x, eps = (exact(value.astype(float)) for value in (w, b, x, eps))
    least = -np.maximum(w * x + b + abs(w) * eps, 0)
    settings = {'eps': 0.125, 'spec': spec, 'method': method}
    plain, sound = (
        exact(np.asarray(margins(network, images, None, **settings, sound=s)[0], float))
        for s in (False, True)
    )
    assert (plain > least).any()
    assert (sound <= least).all()
    assert (least - sound < 1e-3).all()


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_affine_networks_in_every_ball(norm):
    rng = np.random.default_rng(1)
    first, second = (rng.normal(0, 1, (12, 12)).astype(np.float32) for _ in range(2))
    images = rng.uniform(0.4, 0.6, (6, 2, 2, 3)).astype(np.float32)
    network = Partial(lambda a, b, x: x.reshape(len(x), -1) @ a @ b, first, second)
    rows = exact(first.astype(float)) @ exact(second.astype(float))
    clean = exact(images.reshape(6, -1).astype(float)) @ rows
    if norm == 'l2':  # its square is rational, its root within 1e-15
        norms = np.array([float(s) ** 0.5 * (1 - 1e-15) for s in (rows**2).sum(axis=0)])
        norms = exact(norms)
    else:
        norms = abs(rows).sum(axis=0) if norm == 'linf' else abs(rows).max(axis=0)
    least = clean - Fraction(1, 8) * norms
    settings = {'eps': 0.125, 'norm': norm, 'spec': jnp.eye(12), 'method': 'crown'}
    plain, sound = (
        exact(np.asarray(margins(network, images, None, **settings, sound=s), float))
        for s in (False, True)
    )
    assert (plain > least).any()
    assert (sound <= least).all()
    assert (least - sound < 1e-2).all()


def test_what_has_no_error_term_is_named():
    images, labels = jnp.full((1, 1, 1, 4), 0.5), jnp.zeros(1, int)

    def network(x):
        return nn.tanh(x.reshape(1, -1))

    with pytest.raises(NotImplementedError, match='no error term for the rounding of Curve'):
        margins(network, images, labels, eps=0.1, sound=True)
    with pytest.raises(ValueError, match='no sound'):
        margins(network, images, labels, eps=0.1, method='ibp', engine='jax_verify', sound=True)
