"""Sound bounds, by exact rationals: where float32 proves what is false they do not."""

from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from networks import random_relu_network

from robustprune_jax.bounds import METHODS, margins, splits
from robustprune_jax.bounds.graph import build
from robustprune_jax.bounds.margins import label_spec
from robustprune_jax.bounds.units import reduced
from robustprune_jax.bounds.verify import _ball, _crown

exact = np.vectorize(Fraction, otypes=[object])
THIRD, LARGE = np.float32(1 / 3), 2.0**20  # in float32, 3 * THIRD rounds to 1


def cancelling(x):
    """Logits LARGE (x0 - 3 (THIRD x0)) + 0.01 and 0, written as layers."""
    x = x.reshape(len(x), -1)
    hidden = jax.nn.relu(x @ jnp.array([[1, THIRD]]))
    return hidden @ jnp.array([[LARGE, 0], [-3 * LARGE, 0]]) + jnp.array([0.01, 0])


@pytest.mark.parametrize('method', METHODS)
def test_large_terms_that_cancel_prove_nothing(method):
    images, labels = jnp.ones((1, 1, 1, 1)), jnp.zeros(1, int)
    assert Fraction(LARGE) * (1 - 3 * Fraction(float(THIRD))) + Fraction(1, 100) < -0.01
    settings = {'eps': 0.0, 'method': method}
    assert margins(cancelling, images, labels, **settings)[0, 1] > 0
    assert margins(cancelling, images, labels, **settings, sound=True)[0, 1] < -0.01


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


def test_the_units_are_the_network_to_within_their_errors():
    network, images = random_relu_network(jax.random.key(5), (8, 16, 12, 3), 1)
    image, weights = np.asarray(images[0]), network.args[0]
    struct = jax.ShapeDtypeStruct(image.shape, image.dtype)
    graph = build(lambda x: network(x[None])[0], struct)
    ball, spec = _ball(image, 0.25, (0, 1), 'linf', True), label_spec(0, 3, 3)
    _, bounds = _crown(network, image, ball.eps, spec, (0.0, 1.0), 'linf', 2.0, True)
    units, rows, sizes = reduced(graph, network, ball, spec, bounds)
    whole = splits.whole(units, 2)
    found, _ = splits.climb(units, sizes, rows, whole, ball, (0.1, 0.0), 20)
    relus = [tuple(exact(np.ravel(side).astype(float)) for side in b) for b in bounds.values()]
    rng, moved = np.random.default_rng(0), []
    for corner in rng.choice([-0.25, 0.25], (5, 8)):
        x = np.clip(np.ravel(image) + corner, 0, 1).astype(np.float32)
        values, z = np.full(sum(sizes), Fraction(0)), exact(x.astype(float))
        truth, start = [], 0
        for (w, b), (lower, upper), size in zip(weights, relus, sizes, strict=False):
            z = z @ exact(np.asarray(w, float)) + exact(np.asarray(b, float))
            assert (z >= lower).all()
            assert (z <= upper).all()
            open_ = np.flatnonzero((lower < 0) & (upper > 0))
            truth += [(start + i, z[entry]) for i, entry in enumerate(open_)]
            z = np.maximum(z, 0)
            values[start : start + len(open_)] = z[open_]
            start += size
        logits = exact_logits(weights, x)
        assert (found.lower <= logits[0] - logits[1:]).all()
        for part, wanted in ((units.rows, truth), (rows, enumerate(logits[0] - logits[1:]))):
            for i, value in wanted:
                row = (exact(np.asarray(a[i], float)) for a in part)
                image_row, unit_row, bias, error = row
                off = abs(image_row @ exact(x.astype(float)) + unit_row @ values + bias - value)
                assert off <= error.item()
                moved.append(off > 0)
    assert np.mean(moved) > 0.5


def test_what_has_no_error_term_is_named():
    images, labels = jnp.full((1, 1, 1, 4), 0.5), jnp.zeros(1, int)

    def network(x):
        return nn.tanh(x.reshape(1, -1))

    with pytest.raises(NotImplementedError, match='no error term for the rounding of Curve'):
        margins(network, images, labels, eps=0.1, sound=True)
    with pytest.raises(ValueError, match='no sound'):
        margins(network, images, labels, eps=0.1, method='ibp', engine='jax_verify', sound=True)
