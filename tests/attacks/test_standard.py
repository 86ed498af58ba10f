"""The standard ensemble, on networks whose answer is known."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax.attacks import RAND, STANDARD, in_order, pgd, standard
from robustprune_jax.attacks.apgd import apgd, checkpoints
from robustprune_jax.attacks.fab import fab, to_hyperplane
from robustprune_jax.attacks.slots import run
from robustprune_jax.attacks.square import eta, square, widths
from robustprune_jax.config import default
from robustprune_jax.data import Split, load
from robustprune_jax.evaluation.evaluate import evaluate
from robustprune_jax.models import create_model

SHAPE = (24, 6, 6, 2)
WEIGHTS = jax.random.normal(jax.random.key(0), (72, 4))
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), SHAPE, minval=0.4, maxval=0.6))
NUMBERS = np.arange(len(IMAGES))
FAR = jnp.array([0.0, 0.0, -99.0, -99.0])
# Ascending a loss need not lead to the nearest class; with two classes in reach it does.
GRADIENT_ATTACKS = {
    'apgd-ce': (lambda norm: apgd(norm=norm, steps=50), FAR),
    'apgd-dlr': (lambda norm: apgd(norm=norm, loss='dlr', steps=50), FAR),
    'apgd-t': (lambda norm: apgd(norm=norm, loss='dlr_targeted', steps=50), 0.0),
    'fab-t': (lambda norm: fab(norm=norm, steps=50), 0.0),
}


def linear(weights, bias, images):
    return images.reshape(len(images), -1) @ weights + bias


def deep(weights, images):
    return jnp.tanh(linear(weights, 0, images - 0.5))


NETWORK = Partial(linear, WEIGHTS, 0.0)
LABELS = np.asarray(jnp.argmax(NETWORK(IMAGES), -1))


def distances(norm, bias=0.0):
    """Of each image to each class's boundary, [N, 4]; to the predicted class's own, infinite."""
    logits = np.asarray(linear(WEIGHTS, bias, IMAGES))
    size = {'linf': lambda w: np.abs(w).sum(0), 'l2': lambda w: np.linalg.norm(w, axis=0)}[norm]
    found = np.full(logits.shape, np.inf)
    for i, label in enumerate(logits.argmax(-1)):
        for j in set(range(4)) - {label}:
            difference = np.asarray(WEIGHTS[:, j] - WEIGHTS[:, label])
            found[i, j] = (logits[i, label] - logits[i, j]) / size(difference)
    return found


def attack_alone(attack, eps, distance, bias=0.0):
    network = Partial(linear, WEIGHTS, bias)
    labels, targets = np.asarray(jnp.argmax(network(IMAGES), -1)), np.argsort(distance)[:, :-1]
    return run(
        attack, network, jax.random.key(2), IMAGES, labels, targets, NUMBERS, eps=eps, batch_size=8
    )


def assert_in_ball(adversarial, images, eps, norm):
    delta = (np.asarray(adversarial) - images).reshape(len(images), -1)
    size = np.abs(delta).max(axis=1) if norm == 'linf' else np.linalg.norm(delta, axis=1)
    assert size.max() <= eps + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('name', GRADIENT_ATTACKS)
def test_the_optimum_of_a_linear_network_is_reached(name, norm):
    """At each image's distance to the boundary: what 1 % more breaks, 1 % less cannot."""
    attack, bias = GRADIENT_ATTACKS[name]
    distance = distances(norm, bias)
    nearest = distance.min(axis=1)
    for eps in np.quantile(nearest, [0.2, 0.8]):
        adversarial, fooled = attack_alone(attack(norm), eps, distance, bias)
        assert fooled[nearest < 0.99 * eps].all()
        assert not fooled[nearest > 1.0001 * eps].any()
        assert_in_ball(adversarial, IMAGES, eps, norm)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_square_comes_near_the_optimum_of_a_linear_network(norm):
    distance = distances(norm, FAR)
    nearest = distance.min(axis=1)
    eps = np.quantile(nearest, 0.8)
    adversarial, fooled = attack_alone(square(norm=norm, queries=300), eps, distance, FAR)
    assert fooled[nearest < 0.5 * eps].all() and fooled.any()
    assert not fooled[nearest > 1.0001 * eps].any()
    assert_in_ball(adversarial, IMAGES, eps, norm)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_perturbations_stay_in_the_ball_and_the_box(norm):
    """On the box's corners, where clipping and the ball both bind."""
    images = np.round(IMAGES)
    network = Partial(deep, WEIGHTS)
    labels = np.asarray(jnp.argmax(network(images), -1))
    eps = {'linf': 0.3, 'l2': 2.0}[norm]
    for attack in (
        apgd(norm=norm, steps=20),
        fab(norm=norm, steps=20),
        square(norm=norm, queries=200),
    ):
        targets = ((labels + 1) % 4)[:, None]
        adversarial, fooled = run(
            attack,
            network,
            jax.random.key(2),
            images,
            labels,
            targets,
            NUMBERS,
            eps=eps,
            batch_size=24,
        )
        assert fooled.any()
        assert_in_ball(adversarial, images, eps, norm)
        wrong = np.asarray(jnp.argmax(network(adversarial), -1)) != labels
        np.testing.assert_array_equal(wrong, fooled)


@pytest.mark.parametrize(('norm', 'attacks'), [('linf', STANDARD), ('l2', ('apgd-t', 'fab-t'))])
def test_standard_reports_what_is_left(norm, attacks):
    nearest = distances(norm).min(axis=1)
    eps = float(np.quantile(nearest, 0.8))
    labels = np.where(np.arange(24) == 3, (LABELS + 1) % 4, LABELS)  # one is wrong from the start
    adversarial, accuracy = standard(
        NETWORK,
        jax.random.key(0),
        IMAGES,
        labels,
        eps=eps,
        norm=norm,
        attacks=attacks,
        batch_size=10,
    )
    assert list(accuracy) == ['clean', *attacks]
    assert accuracy['clean'] == 23 / 24
    stands = (nearest > eps) & (np.arange(24) != 3)
    assert accuracy[attacks[-1]] == pytest.approx(stands.mean(), abs=0.01)
    right = np.asarray(jnp.argmax(NETWORK(adversarial), -1)) == labels
    assert right.mean() == accuracy[attacks[-1]]
    np.testing.assert_array_equal(adversarial[right], IMAGES[right])
    np.testing.assert_array_equal(adversarial[3], IMAGES[3])
    assert_in_ball(adversarial, IMAGES, eps, norm)


def test_masked_gradients_fool_pgd_but_not_standard():
    """Logits times 1e4: cross-entropy and its gradient are 0, the boundary is where it was."""
    network = Partial(linear, 1e4 * WEIGHTS, 0.0)
    settings = {'eps': 1.1 * float(distances('linf').min(axis=1).max())}
    attacked = pgd(network, jax.random.key(0), IMAGES, LABELS, step_size=0.01, steps=20, **settings)
    survived = np.mean(np.argmax(network(attacked), -1) == LABELS)
    with pytest.warns(UserWarning, match='zero gradient'):
        _, accuracy = standard(network, jax.random.key(0), IMAGES, LABELS, **settings)
    assert survived > 0.5
    assert accuracy['square'] == 0
    with pytest.warns(UserWarning, match='Square broke .* attacks by gradient did not'):
        standard(
            network, jax.random.key(0), IMAGES, LABELS, attacks=('apgd-ce', 'square'), **settings
        )


def test_a_random_network_falls_by_the_mean_gradient():
    """Noise on the logits: eps beyond the far boundary, and well before the near one."""

    def network(key, images):
        logits = linear(WEIGHTS, 0.0, images)
        return logits + 0.01 * jax.random.normal(key, logits.shape)

    nearest = distances('linf').min(axis=1)
    far = nearest > np.quantile(nearest, 0.3)
    for eps, left in ((1.3 * nearest.max(), 0.0), (0.3 * nearest[far].min(), 1.0)):
        adversarial, accuracy = standard(
            network,
            jax.random.key(0),
            IMAGES[far],
            LABELS[far],
            eps=eps,
            attacks=RAND,
            samples=4,
            batch_size=8,
        )
        assert accuracy == {'clean': 1.0, 'apgd-ce': left, 'apgd-dlr': left}
        assert_in_ball(adversarial, IMAGES[far], eps, 'linf')


FOUR_DEVICES = """
import sys
import jax, numpy as np
sys.path.insert(0, 'tests/attacks')
from test_standard import IMAGES, LABELS, NETWORK, in_order
assert jax.device_count() == 4
np.savez(sys.argv[1], *in_order(NETWORK, jax.random.key(0), IMAGES, LABELS, eps=0.02,
                                attacks=('apgd-ce', 'fab-t'), batch_size=9))
"""


def test_four_devices_break_what_one_does(tmp_path):
    adversarial, broken_by = in_order(
        NETWORK, jax.random.key(0), IMAGES, LABELS, eps=0.02, attacks=('apgd-ce', 'fab-t')
    )
    assert 0 < np.mean(broken_by == '') < 1
    flags = '--xla_force_host_platform_device_count=4'
    out = tmp_path / 'four.npz'
    subprocess.run(
        [sys.executable, '-c', FOUR_DEVICES, out],
        env={**os.environ, 'XLA_FLAGS': flags},
        check=True,
    )
    four = np.load(out)
    np.testing.assert_array_equal(four['arr_1'], broken_by)
    np.testing.assert_allclose(four['arr_0'], adversarial, atol=1e-6)


def test_an_image_alone_and_in_company_meets_the_same_attack():
    network = Partial(deep, WEIGHTS)
    labels = np.asarray(jnp.argmax(network(IMAGES), -1))

    def attacked(part, batch_size):
        return run(
            square(queries=100),
            network,
            jax.random.key(2),
            IMAGES[part],
            labels[part],
            np.zeros((24, 1), int)[part],
            NUMBERS[part],
            eps=0.03,
            batch_size=batch_size,
        )

    parts = attacked(slice(10), 4), attacked(slice(10, 24), 4)
    results = (
        attacked(slice(24), 24),
        [np.concatenate(halves) for halves in zip(*parts, strict=True)],
    )
    assert 0 < results[0][1].sum() < 24
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_new_weights_do_not_retrace():
    traces = []

    def network(weights, images):
        traces.append(1)
        return linear(weights, 0, images)

    counts = []
    for scale in (1.0, 2.0):
        standard(
            Partial(network, scale * WEIGHTS),
            jax.random.key(0),
            IMAGES,
            LABELS,
            eps=0.01,
            batch_size=24,
            attacks=('apgd-ce', 'fab-t'),
        )
        counts.append(len(traces))
    assert counts[0] == counts[1]


def test_the_checkpoints_are_the_paper_s():
    windows = checkpoints(100)
    np.testing.assert_array_equal(np.flatnonzero(windows), [22, 41, 57, 70, 80, 87, 93, 99])
    np.testing.assert_array_equal(windows[windows > 0], [22, 19, 16, 13, 10, 7, 6, 6])


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_step_to_a_hyperplane_is_the_smallest_in_the_box(norm):
    """Against bisection in float64; and to the far corner where the box holds no solution."""
    rng = np.random.default_rng(0)
    x, w = (
        rng.uniform(size=(40, 30)),
        rng.normal(size=(40, 30)) * (rng.uniform(size=(40, 30)) > 0.2),
    )
    value = rng.normal(size=40) * np.linspace(0.01, 8, 40)
    d = np.asarray(to_hyperplane(*(jnp.asarray(a, jnp.float32) for a in (x, w, value)), norm))
    towards = -np.sign(value)[:, None] * np.sign(w)
    room = np.where(towards > 0, 1 - x, x)
    slope = np.ones_like(w) if norm == 'linf' else np.abs(w)
    low, high = np.zeros((40, 1)), np.full((40, 1), 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        enough = (np.abs(w) * np.minimum(middle * slope, room)).sum(1, keepdims=True) >= np.abs(
            value[:, None]
        )
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    expected = towards * np.minimum(high * slope, room)
    reachable = (np.abs(w) * room).sum(1) > np.abs(value)
    assert 0 < reachable.sum() < 40
    np.testing.assert_allclose(d, expected, atol=2e-5)


def test_the_squares_shrink_and_the_l2_pattern_has_norm_1():
    np.testing.assert_array_equal(
        widths(10_000, 28, 28, 'linf')[[0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]],
        [25, 18, 13, 9, 6, 4, 3, 2, 2, 1],
    )
    assert set(widths(5000, 28, 28, 'l2') % 2) == {1}
    for side in (3, 4, 9):
        assert np.linalg.norm(eta(side)) == pytest.approx(1, abs=1e-6)
    assert eta(4).sum() == pytest.approx(0, abs=1e-6)  # the hill is the valley's mirror


def _with_nan(images):
    nan = jnp.any(images > 0.9, axis=(1, 2, 3))
    return jnp.where(nan[:, None], jnp.nan, NETWORK(images))


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'eps': -0.1}, 'eps is -0.1: expected a radius from 0 to 1 in linf'),
        ({'eps': 8.0}, r'eps is 8.0: expected a radius from 0 to 1 in linf, .*8/255'),
        ({'norm': 'linfty'}, "unknown norm 'linfty': did you mean 'linf'"),
        ({'attacks': ('pgd',)}, "unknown attack 'pgd': did you mean 'apgd-"),
        ({'images': IMAGES * 255}, r'images have values from .*: expected \[0, 1\] \(0..255'),
        ({'images': IMAGES * np.nan}, 'images have values from nan'),
        ({'images': IMAGES[0]}, 'images have shape'),
        ({'labels': LABELS[:5]}, r'labels are int32 \[5\]: expected ints \[24\]'),
        ({'labels': np.full(24, 4)}, 'label of image 0 is 4: the network has classes 0 to 3'),
        ({'labels': np.full(24, -1)}, 'label of image 0 is -1'),
        ({'logits_fn': lambda x: NETWORK(x)[:, :3], 'labels': LABELS % 3}, 'apgd-t needs at least'),
        (
            {'logits_fn': _with_nan, 'images': np.where(np.arange(24)[:, None, None, None] == 5, 1,
                                                        IMAGES)},
            'the logits of image 5 are not finite',
        ),
        ({'batch_size': 0}, 'batch_size is 0'),
        ({'samples': 5, 'attacks': ('fab-t',)}, 'fab-t does not take samples'),
    ],
)  # fmt: skip
def test_bad_input_is_refused(wrong, message):
    given = {'logits_fn': NETWORK, 'images': IMAGES, 'labels': LABELS, 'eps': 0.1, **wrong}
    logits_fn, images, labels = (given.pop(name) for name in ('logits_fn', 'images', 'labels'))
    with pytest.raises(ValueError, match=message):
        standard(logits_fn, jax.random.key(0), images, labels, **given)


def test_doubtful_networks_bring_a_warning():
    draws = np.random.default_rng(0)

    def noise(images):
        return draws.normal(size=(len(images), 4)).astype(np.float32)

    def random_network(images):
        shape = jax.ShapeDtypeStruct((len(images), 4), jnp.float32)
        drawn = jax.pure_callback(noise, shape, jax.lax.stop_gradient(images))
        return NETWORK(images) + jax.lax.stop_gradient(drawn)

    def probabilities(images):
        return jax.nn.softmax(NETWORK(images))

    def shattered(images):
        """A checkerboard finer than any meaningful step."""
        return NETWORK(images) * jnp.sign(jnp.sin(1e6 * images[:, :1, 0, 0]))

    for network, message in (
        (random_network, 'random'),
        (probabilities, 'probabilities'),
        (shattered, 'reverses .* right predictions'),
    ):
        with pytest.warns(UserWarning, match=message):
            standard(network, jax.random.key(0), IMAGES, LABELS, eps=0.01, attacks=())


def test_evaluation_records_what_broke_each_image(tmp_path):
    """Interrupted, it goes on where it stopped and ends with the same result."""
    config = default()
    config.evaluate.update(attack='standard', batch_size=4, examples=6)
    config.evaluate.pgd.update(eps=0.3, steps=5)
    module = create_model('mnist_model')
    test = load(config.dataset).test
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 28, 28, 1)))
    logits = module.apply(variables, test.images[:6] / np.float32(255))
    labels = np.array(jnp.argmax(logits, -1))
    labels[0] = (labels[0] + 1) % 10
    test = Split(test.images[:6], labels)

    def robust():
        return evaluate(config, 'pretrain', module, variables, test, tmp_path)['robust']

    first = robust()
    entry = first['standard']
    assert {'accuracy', 'examples', 'eps', 'norm', 'after'} == entry.keys()
    assert list(entry['after']) == ['clean', *STANDARD]
    assert entry['after']['clean'] == pytest.approx(5 / 6)
    assert entry['accuracy'] == entry['after']['square'] <= first['pgd']['accuracy']
    path = tmp_path / 'examples/pretrain.standard.jsonl'
    whole = path.read_text()
    assert json.loads(whole.splitlines()[1])['broken_by'] == 'clean'
    path.write_text('\n'.join(whole.splitlines()[:6]) + '\n')
    assert robust() == first
    assert path.read_text() == whole
