"""Masks that move while a sparse network trains: by hand, their counts, and through a run."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from runs import assert_same, weights
from stepping import compiled_step, phase_optimizer

from robustprune_jax import pipeline
from robustprune_jax.config import default
from robustprune_jax.pruning import METHODS, Budget, Choice, configured, kept_count
from robustprune_jax.pruning.dynamic import Dynamic, move
from robustprune_jax.training import checkpoint
from robustprune_jax.training.average import Average
from robustprune_jax.training.optim import OPTIMIZERS, reset_moments

RATE, DECAY, MOMENTUM = 0.1, 0.01, 0.9
IMAGES = np.array([[0, 0.5, 1], [0.2, 0.95, 0], [0.4, 0.1, 0.7]])
LABELS = np.array([0, 1, 2])
KERNEL = np.array([[0.5, -0.2, 0.3], [0.3, 0.4, -0.1], [-0.6, 0.1, 0.2]])
MASK = np.array([[1.0, 0, 1], [1, 0, 1], [1, 0, 0]])


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3, use_bias=False, name='dense')(images.reshape(len(images), -1))


def slope(kernel):
    """The gradient of the mean cross-entropy."""
    odds = np.exp(IMAGES @ kernel)
    return IMAGES.T @ (odds / odds.sum(1, keepdims=True) - np.eye(3)[LABELS]) / 3


def by_hand(steps, moves):
    """Kernel, mask and average after each step of SGD with momentum; moves: how many weights are
    dropped and grown after each."""
    kernel, mask, trace, average = KERNEL.copy(), MASK.copy(), 0 * KERNEL, KERNEL.copy()
    for _, count in zip(range(steps), moves, strict=True):
        dense = slope(kernel * mask)
        trace = dense * mask + DECAY * kernel + MOMENTUM * trace
        kernel = kernel - RATE * trace
        average = 0.5 * average + 0.5 * kernel
        if count:
            dropped = np.argsort(np.where(mask > 0, abs(kernel), np.inf).ravel())[:count]
            after = mask.copy().ravel()
            after[dropped] = 0
            grown = np.argsort(np.where(after > 0, 0, -abs(dense.ravel())))[:count]
            after[grown] = 1
            new = after.reshape(mask.shape) > mask
            assert new.sum() == count  # none is dropped and grown at once
            mask = after.reshape(mask.shape)
            kernel, trace, average = (np.where(new, 0, leaf) for leaf in (kernel, trace, average))
        yield kernel, mask, average


def test_the_smallest_weights_make_room_for_those_of_largest_gradient():
    """After steps 2 and 4 of 8, two of five, then one: 0.6 times 0.85, then 0.5, of them; what has
    grown starts at 0 with no momentum, in the average too."""
    config = default()
    config.finetune.update(
        learning_rate=RATE, weight_decay=DECAY, momentum=MOMENTUM, schedule='constant'
    )
    dynamic = Dynamic('gradient', interval=2.0, fraction=0.6)
    variables = {
        'params': {'dense': {'kernel': KERNEL}},
        'masks': {'dense': {'kernel': MASK}},
    }
    batch = {'image': IMAGES.reshape(3, 1, 3, 1), 'label': LABELS}
    with jax.enable_x64(True):
        update, state = compiled_step(
            Linear(),
            variables,
            batch['image'].shape,
            config,
            'natural',
            phase_optimizer(config, 'finetune', variables),
            total_steps=8,
            average=Average(decay=0.5, start=0.0),
            moves=Choice(Budget(5 / 9), dynamic=dynamic),
        )
        for kernel, mask, average in by_hand(5, (0, 2, 0, 1, 0)):
            state, _ = update(state, batch, jax.random.key(0))
            found = jax.device_get((state.variables, state.average))
            np.testing.assert_array_equal(found[0]['masks']['dense']['kernel'], mask)
            np.testing.assert_allclose(found[0]['params']['dense']['kernel'], kernel, rtol=1e-12)
            np.testing.assert_allclose(found[1]['params']['dense']['kernel'], average, rtol=1e-12)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimizer_forgets_what_has_grown(name):
    config = default()
    config.finetune.update(optimizer=name, weight_decay=0.0)
    leaves = {'params': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}, 'scores': jnp.ones(3)}
    tx = phase_optimizer(config, 'finetune', leaves)
    _, state = tx.update(leaves, tx.init(leaves), leaves)
    keep = jax.tree.map(jnp.ones_like, leaves)
    keep['params']['kernel'] = jnp.array([[1.0, 0], [1, 1]])
    nothing = jax.tree.map(jnp.zeros_like, leaves)
    updates, _ = tx.update(nothing, reset_moments(tx, state, keep), leaves)
    np.testing.assert_array_equal(updates['params']['kernel'] != 0, keep['params']['kernel'] == 1)
    assert (updates['params']['bias'] != 0).all()


def test_a_layer_keeps_its_number_whatever_is_equal_or_zero():
    """Of weights and gradients with few values, of live zeros, of one weight; at each class."""
    rng = np.random.default_rng(0)
    shapes, kept = {('a',): (4, 3, 5), ('b',): (6,), ('head',): (8, 3)}, (17, 1, 5)
    masks = {}
    for (path, shape), count in zip(shapes.items(), kept, strict=True):
        masks[path] = jnp.zeros(shape).ravel().at[:count].set(1).reshape(shape)
    masks['head',] = masks['head',].at[0].set(1)
    counts = {path: int(mask.sum()) for path, mask in masks.items()}
    step = jax.jit(
        lambda kernels, masks, slopes, done, key, grow: move(
            kernels, masks, slopes, Dynamic(grow, 1.0, 1.0), done, key, {('head',): 1}
        ),
        static_argnames='grow',
    )
    before = masks
    for number in range(20):
        kernels, slopes = (
            {path: jnp.float32(rng.integers(-1, 2, shape)) for path, shape in shapes.items()}
            for _ in range(2)
        )
        grow = ('gradient', 'random')[number % 2]
        masks = step(kernels, masks, slopes, number / 20, jax.random.key(number), grow)
        assert {path: int(mask.sum()) for path, mask in masks.items()} == counts
        assert all(np.isin(mask, (0, 1)).all() for mask in masks.values())
        assert (masks['head',].sum(0) >= 1).all()
    assert any((masks[path] != before[path]).any() for path in masks)


@pytest.fixture(scope='module')
def moved(tiny_config, tmp_path_factory):
    """A run from scratch whose masks move, and its config."""
    config = tiny_config()
    config.arch, config.objective, config.methods = 'networks:Banded', 'natural', 'flyingbird'
    config.densities, config.export = (0.3,), ''
    config.phases, config.pretrain.epochs = 'pretrain,finetune,evaluate', 0
    config.pruning.dynamic.interval = 0.7  # steps 2, 4, ..., 10 of 12
    workdir = tmp_path_factory.mktemp('moved') / 'run'
    return config, workdir, pipeline.run(config, workdir)


PART = 'density_0.3/flyingbird/finetune'


def test_a_network_is_sparse_from_the_first_step_to_the_last(moved):
    _, workdir, result = moved
    network = result['networks'][1]
    assert (network['name'], network['title']) == ('flyingbird_0.3', 'FlyingBird')
    folder = workdir / PART / 'checkpoints'
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    masks = [
        flatten_dict(checkpoint.load(folder, step)[0]['masks']) for step in (steps[0], steps[-1])
    ]
    sizes = [{path: int(mask.sum()) for path, mask in of.items()} for of in masks]
    assert sizes[0] == sizes[1]
    assert sum(sizes[0].values()) == network['kept'] == kept_count(network['prunable'], 0.3)
    assert any((masks[0][path] != masks[1][path]).any() for path in masks[0])


def test_a_phase_that_goes_on_moves_the_same_masks(moved, tmp_path):
    config, workdir, result = moved
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    shutil.rmtree(copy / PART / 'checkpoints/12')
    assert pipeline.run(config, copy)['networks'] == result['networks']
    assert_same(weights(copy / PART), weights(workdir / PART))


def test_the_settings_of_a_config_stand_for_those_of_a_method():
    pruning = default().pruning
    assert configured('rigl', pruning) == METHODS['rigl']
    pruning.dynamic.update(grow='random', until=0.5)
    expected = METHODS['rigl'].dynamic._replace(grow='random', until=0.5)
    assert configured('rigl', pruning).dynamic == expected
    assert configured('lwm', pruning).dynamic is None
