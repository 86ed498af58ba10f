"""Smoothed labels in each objective's cross-entropy, and in no attack or bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.config import default
from robustprune_jax.objectives import OBJECTIVES, Progress
from robustprune_jax.rules import check

ALPHA, CLASSES = 0.3, 4
KEYS = jax.random.split(jax.random.key(0), 3)
WEIGHTS = [
    0.7 * jax.random.normal(KEYS[0], (12, 8)),
    0.7 * jax.random.normal(KEYS[1], (8, CLASSES)),
]
BATCH = {'image': jax.random.uniform(KEYS[2], (6, 2, 2, 3)), 'label': jnp.arange(6) % CLASSES}
RISEN = Progress(jnp.asarray(100), 10, 2000, 0.0)


def logits_of(weights, images, train=False, batch_stats=None):
    return jax.nn.relu(images.reshape(len(images), -1) @ weights[0]) @ weights[1], None


def losses(name, **fields):
    """The loss with the labels as they are, with smoothed ones, and the attacked images."""
    network, found = Partial(logits_of, WEIGHTS), []
    for alpha in (0.0, ALPHA):
        config = default()
        config.update_from_flattened_dict(fields)
        config.attack.update(eps=0.1, steps=2)
        config.label_smoothing = alpha
        objective = OBJECTIVES[name](config)

        @jax.jit
        def loss(network, objective=objective):
            batch = objective.inner(network, BATCH, jax.random.key(1), RISEN)
            carry = objective.init_carry(BATCH['image'].shape)
            return objective.loss(network, carry, batch, jax.random.key(1), RISEN)[0], batch

        value, batch = loss(network)
        found.append((float(value), batch))
    (plain, batch), (smoothed, same) = found
    jax.tree.map(np.testing.assert_array_equal, batch, same)
    return plain, smoothed, batch


def change(images, repeats=1):
    """By how much smoothing raises the mean cross-entropy of these images, class by class."""
    logits = logits_of(WEIGHTS, images)[0]
    to_each = [jnp.mean(cross_entropy(logits, jnp.full(len(logits), k))) for k in range(CLASSES)]
    plain = jnp.mean(cross_entropy(logits, jnp.tile(BATCH['label'], repeats)))
    return ALPHA * float(np.mean(to_each) - plain)


@pytest.mark.parametrize(
    ('name', 'fields', 'where', 'weight'),
    [
        ('natural', {}, 'image', 1),
        ('pgd', {}, 'adversarial', 1),
        ('trades', {}, 'image', 1),
        ('free', {}, 'image', 1),
        ('smooth', {'smooth.method': 'stability'}, 'image', 1),
        ('ibp', {'ibp.kappa_end': 0.5}, 'image', 0.5),
        ('crown_ibp', {'crown_ibp.kappa_end': 0.25}, 'image', 0.25),
        ('mixtrain', {}, 'image', 1),
        ('mtl_ibp', {'mtl_ibp.alpha': 0.1}, 'adversarial', 0.9),
    ],
)
def test_every_cross_entropy_of_an_image_has_smoothed_labels(name, fields, where, weight):
    plain, smoothed, batch = losses(name, **fields)
    expected = weight * change(batch[where])
    assert abs(expected) > 1e-3
    assert smoothed - plain == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize('method', ['gaussian', 'adversarial', 'consistency'])
def test_noisy_images_have_them_too(method):
    settings = {'smooth.method': method, 'smooth.sigma': 1e-6}  # so that the images are at hand
    plain, smoothed, batch = losses('smooth', **settings)
    expected = change(batch.get('adversarial', batch['image']))
    assert smoothed - plain == pytest.approx(expected, abs=1e-4)


def test_exp_ibp_smooths_the_factor_of_the_attack():
    _, smoothed, batch = losses('exp_ibp', **{'exp_ibp.alpha': 0.0})
    attacked = logits_of(WEIGHTS, batch['adversarial'])[0]
    one_hot = jax.nn.one_hot(BATCH['label'], CLASSES)
    targets = (1 - ALPHA) * one_hot + ALPHA / CLASSES
    expected = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(attacked), axis=-1))
    assert smoothed == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize('name', ['cc_ibp', 'sabr'])
def test_objectives_of_bounds_alone_refuse_it(name):
    config = default()
    config.finetune.objective, config.label_smoothing = name, 0.1
    with pytest.raises(ValueError, match=r'config.label_smoothing is 0.1: expected 0'):
        check(config)
