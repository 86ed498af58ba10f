"""Free adversarial training, gradient accumulation and bfloat16."""

import os
import signal
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import compiled_step

from robustprune_jax import pipeline
from robustprune_jax.config import default
from robustprune_jax.models import create_model
from robustprune_jax.models.layers import batch_norm
from robustprune_jax.rules import check
from robustprune_jax.runtime import compiler
from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.training import checkpoint


def stepped(module, variables, batch, config, name, steps=1, **settings):
    """Returns the state after so many steps of SGD at rate 0.1, and its metrics."""
    update, state = compiled_step(
        module, variables, batch['image'].shape, config, name, optax.sgd(0.1), **settings
    )
    for _ in range(steps):
        state, metrics = update(state, batch, jax.random.key(0))
    return jax.device_get((state, metrics))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(2, use_bias=False)(images.reshape(len(images), -1))


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_free_moves_weights_and_images_by_one_gradient(platform):
    """Two batches, two updates on each, by hand; black and white pixels move too. Unrolled as on
    CPU, and scanned as elsewhere."""
    config = default()
    config.free.n_repeats = 2
    config.attack.eps = 0.1
    kernel = np.array([[0.5, -0.2], [0.3, 0.4], [-0.6, 0.1]], np.float32)
    images = np.array([[0, 0.5, 1], [0.2, 0.95, 0]], np.float32)
    labels = np.array([0, 1])
    variables = {'params': {'Dense_0': {'kernel': kernel}}}
    batch = {'image': images.reshape(2, 1, 3, 1), 'label': labels}
    with compiler.platform(platform):
        state, _ = stepped(Linear(), variables, batch, config, 'free', steps=2)

    delta = np.zeros_like(images)
    for _ in range(4):
        attacked = np.clip(images + delta, 0, 1)
        odds = np.exp(attacked @ kernel)
        error = (odds / odds.sum(1, keepdims=True) - np.eye(2)[labels]) / 2
        inside = (images + delta >= 0) & (images + delta <= 1)
        delta = np.clip(delta + 0.1 * np.sign((error @ kernel.T) * inside), -0.1, 0.1)
        kernel = kernel - 0.1 * attacked.T @ error
    np.testing.assert_allclose(state.variables['params']['Dense_0']['kernel'], kernel, rtol=1e-5)
    np.testing.assert_allclose(state.carry.reshape(2, 3), delta, atol=1e-6)
    assert state.step == 2


@pytest.fixture
def free_config(tiny_config):
    config = tiny_config()
    config.objective = 'free'
    config.densities = (0.5,)
    config.phases = 'pretrain,prune,finetune'
    config.checkpoint_every = config.validate_every = 100
    config.log_every = 1
    for phase in ('pretrain', 'prune', 'finetune'):
        config[phase].batch_size = 40  # 96 images: the last batch of an epoch goes on into the next
    return config


def test_free_in_all_phases_and_resumed_in_the_middle(free_config, tmp_path):
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    pipeline.run(free_config, whole)
    lines = read_jsonl(whole / 'pretrain/metrics.jsonl')
    # 8 epochs of 3 steps, 4 updates on each batch: 2 passes. The schedule ends at their end.
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]['epoch'] == 2
    expected = [0.05 * (1 + np.cos(np.pi * (4 * step - 1) / 24)) for step in range(1, 7)]
    np.testing.assert_allclose([line['learning_rate'] for line in lines], expected, rtol=1e-5)

    def stop():
        while not read_jsonl(stopped / 'density_0.5/hydra/prune/metrics.jsonl'):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    free_config.prune.epochs = 80  # 20 passes: time to be stopped
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        pipeline.run(free_config, stopped)
    assert left.value.code == 0
    step = checkpoint.load_meta(stopped / 'density_0.5/hydra/prune')['step']
    assert 0 < step < 60
    # What a host leaves behind that dies while it saves is no checkpoint.
    half = stopped / f'density_0.5/hydra/prune/checkpoints/{step + 1}.orbax-checkpoint-tmp/meta'
    half.mkdir(parents=True)
    free_config.phases = 'prune'
    pipeline.run(free_config, stopped)
    assert not half.exists()
    free_config.source = str(stopped / 'pretrain')
    pipeline.run(free_config, tmp_path / 'uninterrupted')
    one, other = (
        checkpoint.load(tmp_path / name / 'density_0.5/hydra/prune')[0]
        for name in ('stopped', 'uninterrupted')
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_free_knows_no_other_ball():
    config = default()
    config.objective = 'free'
    config.attack.norm = 'l2'
    with pytest.raises(ValueError, match=r"config.attack.norm is 'l2': expected linf"):
        check(config)


@pytest.fixture(scope='module')
def mnist_step():
    """Returns a function that steps mnist_model, which has no BatchNorm, twice."""
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.random((8, 12, 12, 1), np.float32),
        'label': np.arange(8, dtype=np.int32) % 3,
    }
    module = create_model('mnist_model', 3)
    variables = jax.jit(module.init)(jax.random.key(0), batch['image'])

    def run(**settings):
        return stepped(module, variables, batch, default(), 'natural', 2, **settings)

    return run


def test_accumulated_gradients_are_those_of_the_whole_batch(mnist_step):
    (whole, whole_metrics), (parts, metrics) = mnist_step(), mnist_step(accumulate=4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (whole.variables, whole_metrics),
        (parts.variables, metrics),
    )


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(2)(batch_norm(images, train, 'bn').reshape(len(images), -1))


def test_every_part_of_an_accumulated_batch_is_mixed_like_the_batch():
    """Of two kinds of images in turn, as pseudo-labelled ones come, each part had one kind, so
    that BatchNorm saw one at a time."""
    images = np.zeros((16, 2, 2, 1), np.float32)
    images[1::2] = 1
    batch = {'image': images, 'label': np.zeros(16, np.int32)}
    variables = Normalised().init(jax.random.key(0), images)
    state, _ = stepped(Normalised(), variables, batch, default(), 'natural', accumulate=4)
    np.testing.assert_allclose(
        state.variables['batch_stats']['bn']['mean'], 0.5 * (1 - 0.9**4), rtol=1e-5
    )


class Asks(nn.Module):
    """Notes the precision that it is traced under."""

    asked = []  # noqa: RUF012

    @nn.compact
    def __call__(self, images, train=False):
        self.asked.append(jax.config.jax_default_matmul_precision)
        return nn.Dense(2)(images.reshape(len(images), -1))


def test_training_takes_the_precision_that_is_asked_for():
    batch = {'image': np.zeros((4, 2, 2, 1), np.float32), 'label': np.zeros(4, np.int32)}
    variables = Asks().init(jax.random.key(0), batch['image'])
    for name, expected in (('', 'bfloat16'), ('highest', 'highest')):
        Asks.asked.clear()
        with jax.default_matmul_precision('bfloat16'):
            stepped(Asks(), variables, batch, default(), 'natural', matmul_precision=name)
        assert set(Asks.asked) == {expected}


def test_bfloat16_computes_with_float32_parameters(mnist_step):
    (exact, metrics), (rounded, rounded_metrics) = (
        mnist_step(),
        mnist_step(compute_dtype='bfloat16'),
    )
    for leaf in jax.tree.leaves(rounded.variables):
        assert leaf.dtype == jnp.float32
    assert rounded_metrics['loss'].dtype == jnp.float32
    assert rounded_metrics['loss'] != metrics['loss']
    assert rounded_metrics['loss'] == pytest.approx(metrics['loss'], rel=0.02)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), exact.variables, rounded.variables
    )
