"""Branch and bound against linear programs over every pattern of signs, and its verdicts."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from networks import random_relu_network
from scipy.optimize import linprog

from robustprune_jax.bounds import intermediate, splits, verify
from robustprune_jax.bounds.graph import build
from robustprune_jax.bounds.margins import label_spec
from robustprune_jax.bounds.units import reduced
from robustprune_jax.bounds.verify import _ball, _crown


def units_of(network, image, eps, label=0):
    """The units of a network on one ball, the rows of all margins, the layers' sizes, the ball."""
    struct = jax.ShapeDtypeStruct(image.shape, image.dtype)
    graph = build(lambda x: network(x[None])[0], struct)
    ball, classes = _ball(image, eps, (0, 1), 'linf', False), graph.shapes[-1].shape[-1]
    spec = label_spec(label, classes, classes)
    _, bounds = _crown(network, image, ball.eps, spec, (0.0, 1.0), 'linf', 2.0, False)
    units, rows, sizes = reduced(graph, network, ball, spec, bounds)
    return units, rows, sizes, ball


def least_margin(weights, image, eps, row, split=None):
    """The least of row @ logits over the ball, by a linear program for each pattern of signs.

    split: of the relus, 0 where both signs are tried. inf where no point has these signs.
    """
    low, high = np.maximum(image - eps, 0), np.minimum(image + eps, 1)
    box, choices, least = [*zip(low, high, strict=True)], [], np.inf
    for w, b in weights[:-1]:  # what intervals decide is not tried
        center, radius = (low + high) / 2 @ w + b, (high - low) / 2 @ abs(w)
        low, high = np.maximum(center - radius, 0), np.maximum(center + radius, 0)
        signs = zip(low > 0, high > 0, strict=True)
        choices += [(1,) if on else (-1, 1) if may else (-1,) for on, may in signs]
    if split is not None:
        choices = [(s,) if s else both for s, both in zip(split, choices, strict=True)]
    for pattern in itertools.product(*choices):
        matrix, offset, rows, limits, start = np.eye(len(image)), np.zeros(len(image)), [], [], 0
        for w, b in weights[:-1]:
            matrix, offset = w.T @ matrix, w.T @ offset + b
            side = np.array(pattern[start : start + len(b)])
            rows.append(-side[:, None] * matrix)
            limits.append(side * offset)
            matrix, offset = matrix * (side > 0)[:, None], offset * (side > 0)
            start += len(b)
        w, b = weights[-1]
        objective, constant = row @ (w.T @ matrix), row @ (w.T @ offset + b)
        found = linprog(objective, np.concatenate(rows), np.concatenate(limits), bounds=box)
        if found.status == 0:
            least = min(least, found.fun + constant)
    return least


def in_float64(network):
    return [(np.asarray(w, float), np.asarray(b, float)) for w, b in network.args[0]]


def test_complete_is_what_every_pattern_of_signs_says():
    network, images = random_relu_network(jax.random.key(5), (8, 6, 5, 3), 12)
    images = images[np.array([0, 2, 3, 4, 10, 11])]
    labels = np.asarray(jnp.argmax(network(images), -1))
    decided = set()
    for eps in (0.15, 0.2):
        for i, verdict in enumerate(verify(network, images, labels, eps=eps, timeout=60)):
            rows = np.asarray(label_spec(labels[i], 3, 3))
            flat = np.asarray(images[i], float).ravel()
            least = min(least_margin(in_float64(network), flat, eps, row) for row in rows)
            assert verdict.status == ('verified' if least > 0 else 'falsified')
            decided.add((verdict.status, verdict.by))
    assert {('verified', 'branching'), ('falsified', 'branching')} <= decided


def test_bounds_of_split_domains_are_below_the_truth_and_reach_it_when_all_is_split():
    network, images = random_relu_network(jax.random.key(5), (8, 6, 5, 3), 1)
    units, rows, sizes, ball = units_of(network, np.asarray(images[0]), 0.5)
    layers = intermediate(network, images, eps=0.5)
    open_ = np.concatenate([(x.lower[0] < 0) & (x.upper[0] > 0) for x in layers])
    places = np.flatnonzero((units.lower < 0) & (units.upper > 0))  # of the same, among the units
    assert len(places) == open_.sum() >= 9
    weights, rng = in_float64(network), np.random.default_rng(0)
    flat = np.ravel(images[0]).astype(float)
    for left_open in (11, 6, 0, 0, 0):
        z, signs = np.clip(flat + rng.uniform(-0.5, 0.5, 8), 0, 1), []
        for w, b in weights[:-1]:  # the signs of a point, so that there is one
            signs += np.sign(z @ w + b).tolist()
            z = np.maximum(z @ w + b, 0)
        signs = np.array(signs) * open_
        signs[rng.permutation(11)[:left_open]] = 0
        exact = least_margin(weights, flat, 0.5, [1, -1, 0], signs)
        whole = splits.whole(units, 1)
        domain = whole._replace(split=whole.split.at[0, places].set(signs[open_]))
        found, _ = splits.climb(units, sizes, rows.at(slice(1)), domain, ball, (0.1, 0.3), 300)
        assert found.lower[0] <= exact + 1e-5
        if not left_open:  # it ends early above 0
            assert found.lower[0] > min(exact - 0.02, 0)


class Residual(nn.Module):
    """BatchNorm, leaky relu, two paths: in eval mode all affine but for the relus."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2)((x - 0.4) / 0.25)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = x + nn.leaky_relu(nn.Conv(4, (3, 3))(x), 0.1)
        x = nn.relu(nn.Dense(8)(nn.avg_pool(x, (2, 2)).reshape(len(x), -1)))
        return nn.Dense(4)(x)


@pytest.fixture(scope='module')
def residual():
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 2))
    variables = jax.jit(Residual().init)(jax.random.key(1), images)
    return Partial(Residual().apply, variables), np.asarray(images)


def test_the_units_are_the_network(residual):
    """Forward through the units: every margin at random points of the ball, and bounds of z."""
    network, images = residual
    units, rows, sizes, ball = units_of(network, images[0], 0.05)
    assert 0 < (units.lower < 0).sum() < sum(sizes)
    rng = np.random.default_rng(0)
    points = rng.uniform(ball.lower, ball.upper, (200, images[0].size)).astype(np.float32)
    values, start = np.zeros((200, sum(sizes)), np.float32), 0
    for size in sizes:
        layer = slice(start, start + size)
        z = points @ units.rows.image[layer].T + values @ units.rows.units[layer].T
        z += units.rows.bias[layer]
        assert (z >= units.lower[layer] - 1e-5).all()
        assert (z <= units.upper[layer] + 1e-5).all()
        values[:, layer] = np.where(z > 0, z, units.negative_slope[layer] * z)
        start += size
    found = points @ rows.image.T + values @ rows.units.T + rows.bias
    logits = np.asarray(network(points.reshape(200, 8, 8, 2)))
    np.testing.assert_allclose(found, logits[:, :1] - logits[:, 1:], atol=1e-5)


@pytest.mark.parametrize('norm, eps', [('linf', 0.02), ('l2', 0.1)])
def test_what_is_verified_stands_and_what_is_falsified_is_in_the_ball(residual, norm, eps):
    network, images = residual
    labels = np.array(jnp.argmax(network(images), -1))
    labels[3] = (labels[3] + 1) % 4
    verdicts = verify(network, images, labels, eps=eps, norm=norm, timeout=20)
    assert verdicts[3].status == 'misclassified'
    rng = np.random.default_rng(0)
    for image, label, verdict in zip(images[:3], labels, verdicts, strict=False):
        delta = rng.uniform(-1, 1, (2000, *image.shape))
        if norm == 'l2':
            delta /= np.sqrt((delta**2).sum(axis=(1, 2, 3), keepdims=True))
        points = np.clip(image + eps * delta, 0, 1).astype(np.float32)
        if verdict.status == 'verified':
            assert (jnp.argmax(network(points), -1) == label).all()
        if verdict.status == 'falsified':
            found = verdict.adversarial - image
            size = np.abs(found).max() if norm == 'linf' else np.sqrt((found**2).sum())
            assert size <= eps + 1e-6
            assert jnp.argmax(network(verdict.adversarial[None]), -1) != label
    assert {v.status for v in verdicts[:3]} & {'verified', 'falsified'}


def test_why_an_image_stays_undecided(residual):
    network, images = residual
    labels = np.asarray(jnp.argmax(network(images), -1))

    def pooled(x):
        return nn.max_pool(network(x)[:, None], (1, 1))[:, 0] * 1.0

    (verdict,) = verify(pooled, images[:1], labels[:1], eps=0.08, timeout=5)
    assert verdict.status == 'falsified' or verdict.reason == 'no branching on MaxPool'
    with pytest.raises(ValueError, match='timeout is -1'):
        verify(network, images, labels, eps=0.1, timeout=-1)
    with pytest.raises(ValueError, match='eps is 8'):
        verify(network, images, labels, eps=8.0)
