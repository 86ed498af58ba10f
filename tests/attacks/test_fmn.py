"""The minimum-norm attack, on networks whose smallest perturbations are known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax.attacks import FAST, fmn, standard
from robustprune_jax.config import default
from robustprune_jax.data import Split, load
from robustprune_jax.evaluation.evaluate import evaluate
from robustprune_jax.models import create_model

WEIGHTS = np.asarray(jax.random.normal(jax.random.key(0), (72, 4)))
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (24, 6, 6, 2)))
BIAS = np.array([20.0, 0, -99, -99], np.float32)  # two classes in reach, and those not near
SIZES = {
    'linf': lambda delta: np.abs(delta).max(-1),
    'l2': lambda delta: np.linalg.norm(delta, axis=-1),
    'l1': lambda delta: np.abs(delta).sum(-1),
    'l0': lambda delta: (delta != 0).sum(-1),
}


def linear(weights, bias, images):
    return images.reshape(len(images), -1) @ weights + bias


def least_size(image, lead, norm):
    """Of a step in the box by which class 1 gains `lead` on class 0, of a linear network: each
    coordinate moves as far as it gains the most for its part of the norm."""
    w = WEIGHTS[:, 1] - WEIGHTS[:, 0]
    w, room = np.abs(w), np.where(w > 0, 1 - image.ravel(), image.ravel())
    if norm in ('linf', 'l2'):
        slope = np.ones_like(w) if norm == 'linf' else w
        low, high = 0.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            enough = w @ np.minimum(middle * slope, room) >= lead
            low, high = (low, middle) if enough else (middle, high)
        return SIZES[norm](np.minimum(high * slope, room))
    order = np.argsort(-(w * room if norm == 'l0' else w))
    gained = np.cumsum((w * room)[order])
    last = np.searchsorted(gained, lead)
    if norm == 'l0':
        return last + 1
    left = lead - gained[last] + (w * room)[order[last]]
    return room[order[:last]].sum() + left / w[order[last]]


@pytest.mark.parametrize('norm', SIZES)
def test_the_smallest_perturbation_of_a_linear_network(norm):
    """Where the box binds, too."""
    labels = np.zeros(24, int)
    labels[3] = 1  # is wrong from the start
    network = Partial(linear, WEIGHTS, BIAS)
    adversarial, distances = fmn(network, IMAGES, labels, norm=norm, batch_size=24)
    logits = np.asarray(network(IMAGES))
    lead = logits[:, 0] - logits[:, 1]
    assert (lead > 0).all()
    expected = [least_size(*pair, norm) for pair in zip(IMAGES, lead, strict=True)]
    right, expected = labels == 0, np.array(expected)
    assert distances[3] == 0 and (adversarial[3] == IMAGES[3]).all()
    assert (distances >= 0.9999 * expected)[right].all()
    if norm == 'l0':
        assert (distances <= expected + 1)[right].all()
        assert np.median(distances[right]) == np.median(expected[right])
    else:
        assert (distances <= 1.01 * expected)[right].all()
    assert (np.argmax(network(adversarial), -1) != labels).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    delta = (adversarial - IMAGES).reshape(24, -1)
    np.testing.assert_allclose(SIZES[norm](delta), distances, rtol=1e-5)


@pytest.mark.parametrize('settings', [{'loss': 'ce'}, {'loss': 'dlr', 'schedule': 'linear'}])
def test_other_losses_and_schedules_find_it_too(settings):
    network, labels = Partial(linear, WEIGHTS, BIAS), np.zeros(24, int)
    _, distances = fmn(network, IMAGES, labels, batch_size=24, **settings)
    logits = np.asarray(network(IMAGES))
    lead = logits[:, 0] - logits[:, 1]
    expected = [least_size(*pair, 'linf') for pair in zip(IMAGES, lead, strict=True)]
    np.testing.assert_allclose(distances, expected, rtol=0.01)


def bent(kernel, images):
    """Class 1 where relus sum to less than 0.3: a convex part of the square of two pixels."""
    hidden = jax.nn.relu(images.reshape(len(images), 2) @ kernel - jnp.array([0.8, -0.6, 0.3]))
    return jnp.stack([jnp.sum(hidden, -1), jnp.full(len(images), 0.3)], -1)


@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1'])
def test_the_smallest_perturbation_of_a_bent_boundary(norm):
    """Against every point of a fine grid."""
    network = Partial(bent, np.array([[1.0, -1.0, 0.5], [0.5, -0.5, -1.0]], np.float32))
    side = np.linspace(0, 1, 1001, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    fooled = grid[np.argmax(network(grid), -1) == 1]
    images = np.array([[0.95, 0.9], [1, 0], [0.05, 0.1], [1, 0.5]], np.float32)
    nearest = [SIZES[norm](fooled - image).min() for image in images]
    assert min(nearest) > 0.04
    labels = np.zeros(4, int)
    _, distances = fmn(network, images.reshape(4, 1, 2, 1), labels, norm=norm, batch_size=4)
    np.testing.assert_allclose(distances, nearest, rtol=0.01, atol=0.001)  # the grid's step


def test_what_no_step_can_reach_is_infinitely_far():
    network = Partial(linear, WEIGHTS, 10 * BIAS)
    adversarial, distances = fmn(network, IMAGES, np.zeros(24, int), steps=5, batch_size=24)
    assert np.isinf(distances).all()
    np.testing.assert_array_equal(adversarial, IMAGES)


def test_distances_agree_with_the_ensemble():
    network = Partial(lambda weights, x: jnp.tanh(linear(weights, 0, x - 0.5) / 3), WEIGHTS)
    labels = np.argmax(network(IMAGES), -1)
    _, distances = fmn(network, IMAGES, labels, batch_size=24)
    eps = float(np.median(distances))
    settings = {'attacks': ('apgd-ce', 'apgd-t'), 'batch_size': 24}
    adversarial, _ = standard(network, jax.random.key(0), IMAGES, labels, eps=eps, **settings)
    stands = np.argmax(network(adversarial), -1) == labels
    assert 0 < stands.sum() < 24
    assert not stands[distances < 0.99 * eps].any()
    assert np.mean(distances > eps) <= stands.mean() + 1 / 24


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'norm': 'l3'}, "unknown norm 'l3'"),
        ({'loss': 'cee'}, "unknown loss 'cee': did you mean 'ce'"),
        ({'schedule': 'cosin'}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({'steps': 0}, 'steps is 0: expected at least 1'),
        ({'loss': 'dlr'}, 'dlr needs at least 3 classes, the network has 2'),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fmn(Partial(linear, WEIGHTS[:, :2], 0.0), IMAGES, np.zeros(24, int), **wrong)


def test_evaluation_records_distances_beside_the_fast_ensemble(tmp_path):
    """Interrupted, it goes on where it stopped and ends with the same result."""
    config = default()
    config.evaluate.update(attack='fast', batch_size=4)
    config.evaluate.distances.update(examples=6, steps=20, radii=(0.0, 0.5))
    module = create_model('lin_1')
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 28, 28, 1)))
    images = load(config.dataset).test.images[:8]
    labels = np.array(jnp.argmax(module.apply(variables, images / np.float32(255)), -1))
    labels[0] = (labels[0] + 1) % 10
    test = Split(images, labels)

    def robust():
        return evaluate(config, 'pretrain', module, variables, test, tmp_path)['robust']

    first = robust()
    assert list(first['fast']['after']) == ['clean', *FAST]
    path = tmp_path / 'examples/pretrain.distances.jsonl'
    whole = path.read_text()
    found = np.array([json.loads(line)['distance'] for line in whole.splitlines()[1:]])
    entry = first['distances']
    assert found[0] == 0 and (found[1:] > 0).all() and len(found) == entry['examples'] == 6
    assert entry['median'] == np.median(found)
    after = {'0': 5 / 6, '0.1': np.mean(found > 0.1), '0.5': np.mean(found > 0.5)}
    assert entry['accuracy_at'] == after
    path.write_text('\n'.join(whole.splitlines()[:4]) + '\n')
    assert robust() == first
    assert path.read_text() == whole
