"""The average of a network while it trains: by hand, saved, resumed and evaluated."""

import shutil

import jax
import numpy as np
import optax
import pytest
from networks import Banded
from runs import assert_same, weights
from stepping import compiled_step

from conversion import load_pth
from robustprune_jax import pipeline
from robustprune_jax.config import default
from robustprune_jax.pruning import effective_params
from robustprune_jax.rules import check
from robustprune_jax.training import checkpoint
from robustprune_jax.training.average import Average


def test_the_average_of_weights_and_statistics_by_hand():
    """Half of five steps the network itself; what trains is the same to the last bit without."""
    rng = np.random.default_rng(0)
    images = rng.random((6, 12, 12, 1), np.float32)
    batch = {'image': images, 'label': np.arange(6) % 3}
    variables = dict(jax.jit(Banded(3).init)(jax.random.key(0), images))
    kernel = variables['params']['conv']['kernel']
    variables['masks'] = {'conv': {'kernel': rng.integers(0, 2, kernel.shape).astype(np.float32)}}
    found = {}
    for average in (None, Average(decay=0.75, start=0.4)):
        update, state = compiled_step(
            Banded(3),
            variables,
            images.shape,
            default(),
            'natural',
            optax.sgd(0.1),
            total_steps=5,
            average=average,
        )
        found[average] = []
        for _ in range(5):
            state, _ = update(state, batch, jax.random.key(0))
            found[average].append(jax.device_get(state.variables))
    assert_same(*found.values())
    expected = None
    for number, after in enumerate(found[average]):
        now = {name: after[name] for name in ('params', 'batch_stats')}
        keep = 0.75 if number >= 2 else 0.0
        expected = jax.tree.map(
            lambda new, old, keep=keep: keep * old + (1 - keep) * new, now, expected or now
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        jax.device_get(state.average),
        expected,
    )


PARTS = ('pretrain', 'density_0.5/hydra/prune', 'density_0.5/hydra/finetune')


@pytest.fixture(scope='module')
def averaged(tiny_config, tmp_path_factory):
    """A run whose phases perturb and average, evaluated by the average, and its config."""
    config = tiny_config()
    config.arch, config.objective, config.methods = 'networks:Banded', 'natural', 'hydra'
    config.densities, config.export = (0.5,), 'torch'
    config.average.update(decay=0.9, start=0.2)
    config.evaluate.checkpoint, config.evaluate.pruned = 'average', True
    for part in PARTS:
        config[part.rpartition('/')[2]].perturbation.update(gamma=0.01, warmup_epochs=3.0)
    workdir = tmp_path_factory.mktemp('averaged') / 'run'
    return config, workdir, pipeline.run(config, workdir)


def averages(path):
    return checkpoint.load(path, 'average')[0]


def test_the_average_is_what_is_evaluated_and_exported(averaged):
    _, workdir, result = averaged
    names = ('pretrain', 'hydra_0.5_pruned', 'hydra_0.5')
    kept = {network['name']: network['kept'] for network in result['networks']}
    for name, part in zip(names, PARTS, strict=True):
        network = averages(workdir / part)
        exported = load_pth(workdir / f'export/{name}.pth.tar')['state_dict']
        kernel = np.asarray(effective_params(network)['head']['kernel'])
        np.testing.assert_array_equal(exported['head/kernel'], kernel.T)
        moves, latest = 'scores' if 'prune' in part else 'params', weights(workdir / part)
        difference = network[moves]['head']['kernel'] - latest[moves]['head']['kernel']
        assert np.abs(difference).max() > 0
        of_masks = sum(int(mask.sum()) for mask in jax.tree.leaves(network.get('masks', {})))
        assert kept[name] == (of_masks or kernel.size + 4 * 4 * 8)
    # What is masked stays so, and each phase starts from the network itself.
    assert_same(averages(workdir / PARTS[2])['masks'], weights(workdir / PARTS[1])['masks'])


def test_a_phase_that_goes_on_has_the_same_average(averaged, tmp_path):
    config, workdir, result = averaged
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    for part in PARTS:  # as if killed in its last epoch
        folder = copy / part / 'checkpoints'
        last = checkpoint.load_meta(folder)['total_steps']
        shutil.rmtree(folder / str(last))
        assert not checkpoint.is_finished(folder)
    assert pipeline.run(config, copy)['networks'] == result['networks']
    for part in PARTS:
        assert_same(weights(copy / part), weights(workdir / part))
        assert_same(averages(copy / part), averages(workdir / part))


def test_without_an_average_there_is_none_to_evaluate(finished):
    config = default()
    config.evaluate.checkpoint = 'average'
    with pytest.raises(ValueError, match=r'latest or best, where average.decay is 0'):
        check(config)
    with pytest.raises(FileNotFoundError, match=r'no average in .*: config.average.decay was 0'):
        averages(finished[0] / 'pretrain')
