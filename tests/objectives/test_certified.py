"""Training with bounds, and the evaluation that verifies."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import DATA
from jax.tree_util import Partial

from robustprune_jax import pipeline
from robustprune_jax.attacks import cross_entropy, pgd
from robustprune_jax.bounds import margins, verified
from robustprune_jax.config import default
from robustprune_jax.data import load
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.objectives import OBJECTIVES, Progress
from robustprune_jax.objectives.mixtrain import weight
from robustprune_jax.objectives.ramps import fraction
from robustprune_jax.report.columns import columns
from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.training import checkpoint

SCHEDULES = json.loads((DATA / 'schedules.json').read_text())


def at(step, ramp_epochs, steps_per_epoch=10):
    return Progress(jnp.asarray(step), steps_per_epoch, 2000, ramp_epochs)


@pytest.mark.parametrize('ramp', ['linear', 'smoothed'])
def test_ramps_of_crown_ibp_are_the_originals(ramp):
    recorded = SCHEDULES[f'crown_{ramp}_epsilon']  # at step 3 of each epoch, length 120
    found = [0.007 * fraction(ramp, at(10 * e + 3, 119.0)) for e in range(len(recorded))]
    np.testing.assert_allclose(found, recorded, rtol=1e-4, atol=1e-12)


def test_a_ramp_within_one_step_ends_at_1():
    """It was NaN for the rest of the phase."""
    for epochs in (0.05, 0.1):  # half a step, and one
        found = [fraction('smoothed', at(step, epochs)) for step in range(4)]
        np.testing.assert_array_equal(found, [0, 1, 1, 1])


def test_schedules_of_mixtrain_are_the_originals():
    epsilon, weights = SCHEDULES['mixtrain_epsilon'], SCHEDULES['mixtrain_interval_weight']
    starts = [at(10 * epoch, 15.0) for epoch in range(len(weights))]
    found = [0.007 * fraction('staircase', progress) for progress in starts[: len(epsilon)]]
    np.testing.assert_allclose(found, epsilon, rtol=1e-5)
    np.testing.assert_allclose([weight(0.1, p) for p in starts], weights, rtol=1e-5)


@pytest.fixture(scope='module')
def problem():
    """A small network, and a batch that it is not sure about."""

    def network(weights, images):
        x = jax.nn.relu(images.reshape(len(images), -1) @ weights[0])
        return jax.nn.relu(x @ weights[1] - 0.1) @ weights[2]

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((12, 16), (16, 8), (8, 4))
    weights = [0.7 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    images = jax.random.uniform(keys[3], (6, 2, 2, 3))
    return Partial(network, weights), {'image': images, 'label': jnp.arange(6) % 4}


def loss_of(name, problem, progress, **settings):
    """The objective's loss and metrics on the problem."""
    network, batch = problem
    config = default()
    config.certified.eps = 0.05
    config[name].update(settings)

    def logits_of(images, train=False, batch_stats=None):
        return network(images), None

    @jax.jit
    def compiled(batch, key):
        return OBJECTIVES[name](config).loss(Partial(logits_of), (), batch, key, progress)

    loss, (_, _, metrics) = compiled(batch, jax.random.key(0))
    return loss, metrics


def test_crown_ibp_is_the_cross_entropy_of_mixed_margins(problem):
    network, batch = problem
    step, ramp_epochs = 25, 10.0
    eps, beta = 0.05 * 0.25, 0.75
    by_intervals, by_crown = (
        margins(network, batch['image'], batch['label'], eps=eps, method=method)
        for method in ('ibp', 'crown_ibp')
    )
    mixed = beta * by_crown + (1 - beta) * by_intervals
    expected = jnp.mean(cross_entropy(-mixed, batch['label']))
    loss, metrics = loss_of('crown_ibp', problem, at(step, ramp_epochs), loss_fusion=False)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics['eps']) == pytest.approx(eps)
    assert float(metrics['verified_accuracy']) == float(jnp.mean(verified(by_intervals)))


def test_the_fused_loss_is_above_every_perturbed_cross_entropy(problem):
    network, batch = problem
    for final_beta in (0.5, 1.0):  # at full eps
        fused, _ = loss_of(
            'crown_ibp', problem, at(100, 0.0), loss_fusion=True, final_beta=final_beta
        )
        noise = np.random.default_rng(0).choice([-0.05, 0.05], (1000, *batch['image'].shape))
        points = jnp.clip(batch['image'] + noise, 0, 1)
        losses = jax.vmap(lambda x: cross_entropy(network(x), batch['label']))(points)
        worst = jnp.mean(jnp.max(losses, axis=0))
        by_intervals = margins(network, batch['image'], batch['label'], eps=0.05, method='ibp')
        assert worst < fused
        assert fused < jnp.mean(cross_entropy(-by_intervals, batch['label']))


def test_crown_ibp_without_a_ramp_is_training_on_intervals(problem):
    crown, _ = loss_of('crown_ibp', problem, at(3, 0.0))
    by_intervals, _ = loss_of('ibp', problem, at(3, 0.0), kappa_end=0.0)
    assert float(crown) == pytest.approx(float(by_intervals), rel=1e-6)


def test_ibp_mixes_in_the_clean_loss(problem):
    network, batch = problem
    clean = jnp.mean(cross_entropy(network(batch['image']), batch['label']))
    start, _ = loss_of('ibp', problem, at(0, 10.0))
    assert float(start) == pytest.approx(float(clean), rel=1e-5)
    robust, _ = loss_of('ibp', problem, at(100, 10.0), kappa_end=0.0)
    half, _ = loss_of('ibp', problem, at(100, 10.0), kappa_end=0.5)
    assert float(half) == pytest.approx(float(clean + robust) / 2, rel=1e-5)


def test_mixtrain_adds_the_symbolic_worst_case_of_some_images(problem):
    network, batch = problem
    clean = jnp.mean(cross_entropy(network(batch['image']), batch['label']))
    lower = margins(network, batch['image'], batch['label'], eps=0.05, method='symbolic')
    each = cross_entropy(-lower, batch['label'])
    loss, _ = loss_of('mixtrain', problem, at(0, 0.0), images=1, probability=1.0)
    added = (loss - clean) / 0.1
    assert np.abs(each - added).min() < 1e-4  # of the one image that was drawn
    never, _ = loss_of('mixtrain', problem, at(0, 0.0), images=1, probability=1e-6)
    assert float(never) == pytest.approx(float(clean), rel=1e-5)


@pytest.fixture(scope='module')
def certified_run(tiny_config, tmp_path_factory):
    """A run under interval bounds, verified by a cascade."""
    config = tiny_config()
    config.objective = 'ibp'
    config.densities = (0.5,)
    config.phases = 'pretrain,prune,finetune,evaluate'
    config.certified.eps = config.evaluate.pgd.eps = 0.02
    config.evaluate.certified.update(methods='ibp,crown_ibp,symbolic,complete', timeout=5.0)
    for phase in ('pretrain', 'prune', 'finetune'):
        config[phase].update(optimizer='adam', learning_rate=2e-3)
    config.pretrain.update(epochs=16, ramp_epochs=8.0)
    workdir = tmp_path_factory.mktemp('certified') / 'run'
    return config, workdir, pipeline.run(config, workdir)


def test_verified_accuracy_is_below_attacked_accuracy(certified_run):
    _, workdir, result = certified_run
    for network in result['networks']:
        robust = network['robust']
        cascade = ('ibp', 'crown_ibp', 'symbolic', 'complete', 'pgd')
        accuracies = [robust[m]['accuracy'] for m in cascade]
        assert accuracies == sorted(accuracies)
        end = robust['complete']
        assert end['accuracy'] + end['attacked'] + end['undecided'] == pytest.approx(1)
        assert sum(end['counts'].values()) == end['examples']
        assert end['counts']['verified'] == pytest.approx(end['accuracy'] * end['examples'])
        assert end['timeout'] == 5
    titles = {column.title for column in columns([result])}
    assert {'branch and bound', 'branch and bound: undecided'} <= titles
    assert {n['name']: n for n in result['networks']}['pretrain']['robust']['ibp']['accuracy'] > 0.3
    metrics = read_jsonl(workdir / 'pretrain' / 'metrics.jsonl')
    assert metrics[0]['eps'] < metrics[-1]['eps'] == pytest.approx(0.02)
    assert 'validation_verified_accuracy' in metrics[-1]


def test_verified_images_survive_a_strong_attack(certified_run):
    config, workdir, _ = certified_run
    module = create_model(config.arch, 3)
    images, labels = load(config.dataset).test
    for name, folder in (('pretrain', 'pretrain'), ('hydra_0.5', 'density_0.5/hydra/finetune')):
        network = logits_fn(module, checkpoint.load(workdir / folder)[0])
        attacked = pgd(
            network, jax.random.key(1), jnp.asarray(images / 255, jnp.float32), labels,
            eps=0.02, step_size=0.002, steps=100, restarts=2, loss='margin',
        )  # fmt: skip
        stands = np.argmax(network(attacked), axis=1) == labels
        for method in ('ibp', 'crown_ibp', 'symbolic'):
            for line in read_jsonl(workdir / 'examples' / f'{name}.{method}.jsonl')[1:]:
                assert stands[line['index']] or line['margin'] <= 0
        for line in read_jsonl(workdir / 'examples' / f'{name}.complete.jsonl')[1:]:
            assert stands[line['index']] or line['status'] != 'verified'


def test_verification_goes_on_where_it_was_interrupted(certified_run, tmp_path):
    config, finished, result = certified_run
    workdir = tmp_path / 'run'
    shutil.copytree(finished, workdir)
    path = workdir / 'examples' / 'hydra_0.5.ibp.jsonl'
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text(''.join(lines[:22]) + lines[22][:9])
    again = pipeline.run(config, workdir)
    assert path.read_text() == whole
    assert again['networks'] == result['networks']

    other = copy.deepcopy(config)
    other.evaluate.certified.methods = 'crown_ibp,ibp'
    with pytest.raises(ValueError, match='after: '):
        pipeline.run(other, workdir)


def test_bounds_of_images_that_another_attack_left_are_not_taken(certified_run, tmp_path):
    config, finished, _ = certified_run
    workdir = tmp_path / 'run'
    shutil.copytree(finished, workdir)
    for path in workdir.glob('examples/*.ibp.jsonl'):  # so that the second method sees some images
        header, *lines = read_jsonl(path)
        undecided = [line | {'margin': -1.0} for line in lines]
        path.write_text(''.join(json.dumps(line) + '\n' for line in [header, *undecided]))
    pipeline.run(config, workdir)
    for attacked in workdir.glob('examples/*.pgd.jsonl'):
        attacked.unlink()
    other = copy.deepcopy(config)
    other.evaluate.pgd.steps += 1
    with pytest.raises(ValueError, match=r'crown_ibp.*other settings \(pgd\.steps: 3, 4\)'):
        pipeline.run(other, workdir)


def test_an_unsound_record_is_not_reported(certified_run, tmp_path):
    config, finished, _ = certified_run
    workdir = tmp_path / 'run'
    shutil.copytree(finished, workdir)
    path = workdir / 'examples' / 'pretrain.pgd.jsonl'
    header, *lines = read_jsonl(path)
    broken = [line | {'prediction': (line['label'] + 1) % 3} for line in lines]
    path.write_text(''.join(json.dumps(line) + '\n' for line in [header, *broken]))
    with pytest.raises(AssertionError, match='a bound is not sound'):
        pipeline.run(config, workdir)


@pytest.mark.parametrize(
    'field, value, message',
    [
        (
            'evaluate.certified.methods',
            'ibp,crwn',
            "certified.methods 'crwn': did you mean 'crown'",
        ),
        ('certified.ramp', 'smooth', "unknown config.certified.ramp 'smooth'"),
        ('certified.eps', 1.5, 'config.certified.eps is 1.5'),
        ('pretrain.ramp_epochs', 99.0, 'config.pretrain.ramp_epochs is 99.0'),
        ('crown_ibp.final_beta', 2.0, 'config.crown_ibp.final_beta is 2.0'),
    ],
)
def test_bad_settings_are_found_before_training(tiny_config, tmp_path, field, value, message):
    config = tiny_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        pipeline.run(config, tmp_path / 'run')
