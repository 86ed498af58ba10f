"""alpha-CROWN, and the bounds inside a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_relu_network

from robustprune_jax.bounds import intermediate, margins


def test_a_slope_between_crowns_two():
    """relu(z) - z / 2 over z in [-0.3, 0.4] is at least 0, by the line z / 2; CROWN takes z."""
    images, labels = jnp.full((1, 1, 1, 1), 0.55), jnp.zeros(1, int)

    def network(x):
        z = x[:, 0, 0] - 0.5
        return jnp.concatenate([jax.nn.relu(z), z / 2], 1)

    crown = margins(network, images, labels, eps=0.35, method='crown')
    assert crown[0, 1] == pytest.approx(-0.15, abs=1e-6)
    alpha = margins(network, images, labels, eps=0.35, method='alpha_crown')
    assert alpha[0, 1] == pytest.approx(0, abs=0.01)


def test_a_slope_for_each_row():
    """As above, both of relu(z) - z / 2 and relu(z) - z / 10, which no one slope bounds by 0."""
    images, spec = jnp.full((1, 1, 1, 1), 0.55), jnp.array([[1, -0.5], [1, -0.1]])

    def network(x):
        z = x[:, 0, 0] - 0.5
        return jnp.concatenate([jax.nn.relu(z), z], 1)

    alpha = margins(network, images, None, eps=0.35, method='alpha_crown', spec=spec)
    np.testing.assert_allclose(alpha, 0, atol=0.01)


def test_never_below_crown_and_often_above():
    network, images = random_relu_network(jax.random.key(0), (8, 12, 12, 4), 6)
    labels = jnp.zeros(6, int)
    crown = margins(network, images, labels, eps=0.1, method='crown')
    alpha = margins(network, images, labels, eps=0.1, method='alpha_crown', iterations=40)
    assert (alpha >= crown - 1e-5).all()
    assert (alpha > crown + 0.01).mean() > 0.3


def test_intermediate_bounds_hold_and_count_the_unstable():
    network, images = random_relu_network(jax.random.key(1), (8, 12, 12, 4), 3)
    layers = intermediate(network, images, eps=0.1)
    assert [layer.operation for layer in layers] == ['Relu', 'Relu']
    weights = network.args[0]
    points = images + 0.1 * jax.random.uniform(
        jax.random.key(2), (500, *images.shape), minval=-1.0, maxval=1.0
    )
    z = jnp.clip(points, 0, 1).reshape(500, 3, -1)
    for (w, b), layer in zip(weights, layers, strict=False):
        z = z @ w + b
        assert (z >= layer.lower - 1e-5).all()
        assert (z <= layer.upper + 1e-5).all()
        open_ = (layer.lower < 0) & (layer.upper > 0)
        np.testing.assert_array_equal(layer.unstable, open_.sum(axis=1))
        assert layer.unstable.sum() > 0
        z = jax.nn.relu(z)
    intervals = intermediate(network, images, eps=0.1, method='ibp')
    assert (intervals[1].unstable >= layers[1].unstable).all()


def test_settings_that_mean_nothing():
    network, images = random_relu_network(jax.random.key(0), (8, 4), 1)
    with pytest.raises(ValueError, match='iterations is 0'):
        margins(network, images, jnp.zeros(1, int), eps=0.1, method='alpha_crown', iterations=0)
    with pytest.raises(ValueError, match='eps is'):
        intermediate(network, images, eps=2.0)
