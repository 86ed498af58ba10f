import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import DATA, formula_images, formula_state_dict, recorded_shapes
from jax.tree_util import Partial

from conversion import import_state_dict
from robustprune_jax.bounds import METHODS, margins
from robustprune_jax.models import create_model
from robustprune_jax.models.resnet import ResNet
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import init_scores, topk_masks

GOLDEN = json.loads((DATA / 'bounds.json').read_text())


class Everything(nn.Module):
    """Every operation that has a bound, in a network of a few hundred weights."""

    @nn.compact
    def __call__(self, x, train=False):
        x = (x - jnp.array([0.4, 0.5])) / 0.25
        x = nn.Conv(4, (3, 3), strides=2, padding=((1, 0), (0, 1)))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x)
        y = nn.leaky_relu(nn.Conv(4, (3, 3), padding='VALID', feature_group_count=2)(x), 0.1)
        y = jax.checkpoint(lambda y: jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))))(y)
        x = jax.lax.platform_dependent(x + y, cpu=lambda x: 2 * x, default=lambda x: x * 2)
        x = jnp.concatenate([nn.max_pool(x, (2, 2), (1, 1)), -nn.avg_pool(x, (2, 2), (1, 1))], -1)
        x = jnp.maximum(x[:, :2], 0.05).transpose(0, 3, 1, 2)
        mean = x.mean(axis=(2, 3))
        x = jax.nn.relu(nn.Dense(8)(jnp.concatenate([x.reshape(len(x), -1), mean], axis=1)))
        return nn.Dense(5)(x)


@pytest.fixture(scope='module')
def everything():
    module = Everything()
    x = jax.random.uniform(jax.random.key(0), (3, 7, 7, 2))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    statistics = jax.tree.map(lambda s: s + 0.3, variables['batch_stats'])
    return Partial(module.apply, {**variables, 'batch_stats': statistics}), x, jnp.arange(3)


def sampled_margins(network, images, labels, eps, norm='linf', count=1000):
    """The least margin of each class among random points of the ball within [0, 1], [B, K]."""
    rng = np.random.default_rng(0)
    every, least = jax.jit(jax.vmap(network)), np.inf
    for i in range(0, count, 250):
        delta = rng.uniform(-1, 1, (250, *images.shape))
        if i >= 500 and norm == 'linf':
            delta = np.sign(delta)  # the corners are worse
        if norm != 'linf':
            order = {'l2': 2, 'l1': 1}[norm]
            if norm == 'l1':
                delta = np.sign(delta) * np.abs(delta) ** 20  # near the corners
            flat = delta.reshape(250, len(images), -1)
            delta /= np.linalg.norm(flat, order, axis=2).reshape(250, -1, 1, 1, 1)
        points = np.clip(images + eps * delta, 0, 1).astype(np.float32)
        logits = np.asarray(every(points))
        own = np.take_along_axis(logits, np.asarray(labels)[None, :, None], 2)
        least = np.minimum(least, (own - logits).min(axis=0))
    return least


@pytest.mark.parametrize('key', GOLDEN)
def test_bounds_are_the_originals(key):
    recorded = GOLDEN[key]
    arch, eps = key.split('/')
    shapes = list(recorded_shapes(arch).values())
    labels = np.array(recorded['labels'])
    size = 28 if arch == 'mnist_model' else 32
    images = formula_images((len(labels), shapes[0][1], size, size))
    network = logits_fn(create_model(arch), import_state_dict(formula_state_dict(arch), arch))
    for method in METHODS:
        if method not in recorded:
            continue
        expected = np.array(recorded[method])
        if method == 'symbolic':  # the box of each image is cut to its own range of values
            found = [
                margins(
                    network,
                    images[i : i + 1],
                    labels[i : i + 1],
                    eps=float(eps),
                    method=method,
                    clip=(images[i].min(), images[i].max()),
                )[0]
                for i in range(len(labels))
            ]
        else:
            found = margins(
                network, images, labels, eps=float(eps), method=method, clip=tuple(recorded['clip'])
            )
            found = [np.delete(row, label) for row, label in zip(found, labels, strict=True)]
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(np.ravel(found), np.ravel(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize('norm, eps', [('linf', 0.03), ('l2', 0.2), ('l1', 0.5)])
def test_random_points_never_violate_a_bound(everything, norm, eps):
    network, images, labels = everything
    sampled = sampled_margins(network, images, labels, eps, norm)
    for method in METHODS if norm == 'linf' else ('crown_ibp', 'crown'):
        lower = np.asarray(margins(network, images, labels, eps=eps, norm=norm, method=method))
        assert (lower <= sampled + 1e-5).all(), method
        assert (lower[np.arange(3), labels] == 0).all()


def test_bounds_close_as_the_ball_shrinks(everything):
    network, images, labels = everything
    clean = sampled_margins(network, images, labels, 0.0, count=250)
    for method in METHODS:
        widths = []
        for eps in (1e-2, 1e-3, 1e-4):
            lower = margins(network, images, labels, eps=eps, method=method)
            widths.append(np.abs(clean - lower).max())
        assert widths[1] < widths[0] / 5
        assert widths[2] < widths[1] / 5


def test_l2_and_l1_balls_are_bounded_tighter_than_their_box(everything):
    network, images, labels = everything
    box = margins(network, images, labels, eps=0.05, method='crown')
    for norm in ('l2', 'l1'):
        ball = margins(network, images, labels, eps=0.05, norm=norm, method='crown')
        assert (ball >= box - 1e-5).all()
        assert (ball > box + 1e-3).any()


def test_a_linear_networks_bounds_are_exact():
    weights = jax.random.normal(jax.random.key(0), (12, 3))
    images = jax.random.uniform(jax.random.key(1), (4, 2, 2, 3), minval=0.3, maxval=0.7)
    labels = jnp.array([0, 1, 2, 0])
    network = Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
    difference = weights[:, labels].T[:, :, None] - weights
    clean = jnp.einsum('bn,bnk->bk', images.reshape(4, -1), difference)
    for norm, dual in (('linf', 1), ('l2', 2), ('l1', np.inf)):
        exact = clean - 0.1 * np.linalg.norm(difference, dual, axis=1)
        for method in METHODS if norm == 'linf' else ('crown_ibp', 'crown', 'symbolic'):
            lower = margins(network, images, labels, eps=0.1, norm=norm, method=method)
            np.testing.assert_allclose(lower, exact, atol=1e-5)


def test_boxes_stop_at_black_and_white():
    """A relu that only a pixel below 0 could switch off is known to be on."""
    network = Partial(lambda x: jnp.stack([x[:, 0, 0, 0], jax.nn.relu(x[:, 0, 0, 0] + 0.1)], 1))
    images = jnp.zeros((1, 1, 1, 1))
    for method in METHODS:
        inside = margins(network, images, jnp.array([1]), eps=0.5, method=method)
        assert inside[0, 0] == pytest.approx(0.1 if method != 'ibp' else -0.4, abs=1e-6)
        beyond = margins(network, images, jnp.array([1]), eps=0.5, method=method, clip=None)
        assert beyond[0, 0] <= inside[0, 0] - (0.05 if method == 'ibp' else 0)


def test_a_specification_of_ones_own(everything):
    network, images, _ = everything
    spec = jnp.array([[1.0, 0, 0, 0, -1], [0, 0.5, 0.5, -1, 0]])
    lower = margins(network, images, None, eps=0.01, spec=spec)
    assert lower.shape == (3, 2)
    of_zero = margins(network, images, jnp.zeros(3, int), eps=0.01)
    np.testing.assert_allclose(lower[:, 0], of_zero[:, 4], atol=1e-5)


def test_an_eps_for_each_image(everything):
    network, images, labels = everything
    eps = jnp.array([0.0, 0.01, 0.02])
    together = margins(network, images, labels, eps=eps)
    for i in range(3):
        alone = margins(network, images[i : i + 1], labels[i : i + 1], eps=eps[i])
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_chunks_do_not_change_the_bounds(everything):
    network, images, labels = everything
    for method in ('crown', 'symbolic'):
        at_once = margins(network, images, labels, eps=0.02, method=method)
        in_pieces = margins(network, images, labels, eps=0.02, method=method, memory_gb=1e-4)
        np.testing.assert_allclose(at_once, in_pieces, atol=1e-5)
    with pytest.raises(MemoryError, match='one row of bounds'):
        margins(network, images, labels, eps=0.02, method='crown', memory_gb=1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_gradients_are_finite_differences(method):
    first, second = (0.5 * jax.random.normal(jax.random.key(i), (8, 8)) for i in range(2))
    images = jax.random.uniform(jax.random.key(2), (3, 2, 2, 2))
    labels = jnp.arange(3)

    def network(scale, x):
        x = jax.nn.relu(scale * x.reshape(len(x), -1) @ first)
        return jax.nn.relu(x @ second - 0.1) @ first[:, :4]

    @jax.jit
    def total(scale):
        bounds = margins(Partial(network, scale), images, labels, eps=0.1, method=method)
        return jnp.sum(bounds)

    gradient = jax.jit(jax.grad(total))(1.0)
    difference = (total(1.001) - total(0.999)) / 0.002
    assert float(gradient) == pytest.approx(float(difference), rel=0.02)


def test_gradients_stay_finite_where_a_relu_hardly_moves():
    images = jax.random.uniform(jax.random.key(0), (2, 2, 2, 2))
    weights = jax.random.normal(jax.random.key(1), (8, 8))

    def total(scale):
        network = Partial(lambda s, x: jax.nn.relu(s * x.reshape(len(x), -1) @ weights), scale)
        return jnp.sum(margins(network, images, jnp.arange(2), eps=0.1, method='crown_ibp'))

    assert jnp.isfinite(jax.grad(total)(1e-22))


def test_float64_bounds(everything):
    network, images, labels = everything
    with pytest.raises(ValueError, match='jax_enable_x64'):
        margins(network, images, labels, eps=0.02, dtype=jnp.float64)
    single = margins(network, images, labels, eps=0.02, method='crown')
    with jax.enable_x64(True):
        double = margins(network, images, labels, eps=0.02, method='crown', dtype=jnp.float64)
        zero = margins(network, images, labels, eps=0.0, method='crown', dtype=jnp.float64)
        wide = jax.tree.map(lambda w: w.astype(jnp.float64), network)
        logits = wide(images.astype(jnp.float64))
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, atol=1e-4)
    clean = logits[np.arange(3), labels][:, None] - logits
    np.testing.assert_allclose(zero, clean, atol=1e-12)


def test_masked_networks_have_the_bounds_of_their_dense_export():
    module = create_model('mnist_model')
    images = formula_images((2, 1, 28, 28))
    labels = np.array([3, 7])
    params = import_state_dict(formula_state_dict('mnist_model'), 'mnist_model')['params']
    masks = topk_masks(init_scores(params), 0.1)
    masked = logits_fn(module, {'params': params, 'masks': masks})
    dense = {'params': jax.tree.map(lambda w: w, masked.args[0]['params'])}
    np.testing.assert_array_equal(
        margins(masked, images, labels, eps=0.02),
        margins(Partial(module.apply, dense), images, labels, eps=0.02),
    )


@pytest.mark.parametrize('arch', ['wrn_28_1', 'ResNet'])
def test_residual_networks_with_batch_norm(arch):
    images = formula_images((1, 3, 12, 12))
    labels = np.array([0])
    if arch == 'wrn_28_1':
        module = create_model(arch)
        variables = import_state_dict(formula_state_dict(arch), arch)
    else:
        module = ResNet(blocks=(1, 1, 0, 0), bottleneck=False, imagenet_stem=False)
        variables = jax.jit(module.init)(jax.random.key(0), images)
    network = logits_fn(module, variables)
    sampled = sampled_margins(network, images, labels, 1e-4, count=250)
    for method in ('ibp', 'crown_ibp'):
        lower = margins(network, images, labels, eps=1e-4, method=method)
        assert np.isfinite(lower).all()
        assert (lower <= sampled + 1e-4 * np.abs(sampled).max()).all()


class Odd(nn.Module):
    """A network with one layer that may have no bound."""

    layer: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        layers = {
            'sorted': jnp.sort,
            'steps': lambda x: nn.relu((10 * x).astype(int).astype(x.dtype)),
            'gate': lambda x: x * (x > 0),
        }
        x = layers[self.layer](x)
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        ('sorted', r"'sort'.* at .*test_bounds\.py:\d+.*; there are bounds for abs, add"),
        # An interval through a cast was [0.5, 0.5] where the truth went down to -0.5.
        ('steps', r"'convert_element_type'.* at .*test_bounds\.py:\d+.*casts to integers"),
        ('gate', r"'convert_element_type'.* at .*test_bounds\.py:\d+.*comparisons as numbers"),
    ],
)
def test_what_has_no_bound_is_refused_at_the_users_line(layer, message):
    images = jnp.full((1, 6, 6, 2), 0.09)
    variables = jax.jit(Odd(layer).init)(jax.random.key(0), images)
    with pytest.raises(NotImplementedError, match=message):
        margins(Partial(Odd(layer).apply, variables), images, jnp.zeros(1, int), eps=0.02)


def test_an_empty_ball_has_the_clean_margins(everything):
    network, images, labels = everything
    logits = network(images)
    clean = jnp.take_along_axis(logits, labels[:, None], 1) - logits
    for method in METHODS:
        lower = margins(network, images, labels, eps=0.0, method=method)
        np.testing.assert_allclose(lower, clean, atol=1e-5)


def test_errors_say_what_was_wrong(everything):
    network, images, labels = everything

    def loud(x):
        return jnp.sin(x).reshape(len(x), -1)[:, :3]

    with pytest.raises(NotImplementedError, match=r"'sin'.*test_bounds\.py:\d+.*loud"):
        margins(loud, images, labels, eps=0.1)
    training = Partial(lambda v, x: Everything().apply(v, x, True, mutable=['batch_stats'])[0])
    training = Partial(training.func, network.args[0])
    with pytest.raises(NotImplementedError, match='BatchNorm must be in eval mode'):
        margins(training, images, labels, eps=0.1)
    with pytest.raises(ValueError, match='do not depend on the image'):
        margins(lambda x: jnp.zeros((len(x), 3)), images, labels, eps=0.1)
    for eps in (-0.1, 1.1):
        with pytest.raises(ValueError, match='eps is'):
            margins(network, images, labels, eps=eps)
    with pytest.raises(ValueError, match=r'images have values from 2.* to .*: expected \[0, 1\]'):
        margins(network, images + 2, labels, eps=0.1)
    with pytest.raises(ValueError, match='unknown method'):
        margins(network, images, labels, eps=0.1, method='deeppoly')
    with pytest.raises(ValueError, match='the network has 5 logits'):
        margins(network, images, labels, eps=0.1, num_classes=6)
