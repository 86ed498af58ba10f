"""The whole job on small images: files, restarts, sources, and errors before training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from conversion import from_torch, load_pth, to_onnx, to_torch
from robustprune_jax import pipeline, rules, zoo
from robustprune_jax.pruning import kept_count
from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.training import checkpoint

ROOT = Path(__file__).parents[1]
NETWORKS = ['pretrain', 'hydra_0.5', 'lwm_0.5', 'hydra_0.1', 'lwm_0.1']


def weights(path):
    return checkpoint.load(path)[0]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_result_of_a_run(finished):
    workdir, result = finished
    assert json.loads((workdir / 'result.json').read_text()) == result
    networks = {network['name']: network for network in result['networks']}
    assert sorted(networks) == sorted(NETWORKS)
    for name, network in networks.items():
        method, _, density = name.partition('_')
        density = float(density or 1)
        masks = weights(workdir / network['checkpoint'])
        sizes = [leaf.size for leaf in jax.tree.leaves(masks.get('masks', {}))]
        assert network['density'] == density
        assert network['method'] == (None if name == 'pretrain' else method)
        titles = {'pretrain': 'pretrained', 'hydra': 'HYDRA', 'lwm': 'LWM'}
        assert network['title'] == titles[method]
        assert sum(kept for kept, _ in network['layers'].values()) == network['kept']
        if sizes:
            assert network['kept'] == sum(kept_count(size, density) for size in sizes)
        assert network['examples'] == network['robust']['pgd']['examples'] == 40
        assert network['robust']['pgd']['accuracy'] <= network['clean_accuracy'] <= 1
        for evaluation, accuracy in (
            ('clean', network['clean_accuracy']),
            ('pgd', network['robust']['pgd']['accuracy']),
        ):
            header, *lines = read_jsonl(workdir / 'examples' / f'{name}.{evaluation}.jsonl')
            assert header['network'] == name
            assert [line['index'] for line in lines] == list(range(40))
            correct = [line['label'] == line['prediction'] for line in lines]
            assert np.mean(correct) == pytest.approx(accuracy)
    # The bands are easy: what does not learn them is broken.
    assert networks['pretrain']['clean_accuracy'] > 0.8
    assert networks['hydra_0.5']['robust']['pgd']['accuracy'] > 0.6


def test_exports_are_the_masked_networks(finished):
    workdir, _ = finished
    for name, folder in (('hydra_0.1', 'hydra'), ('lwm_0.1', 'lwm')):
        state_dict = load_pth(workdir / 'export' / f'{name}.pth.tar')['state_dict']
        variables = weights(workdir / 'density_0.1' / folder / 'finetune')
        dense = variables['params']['dense2']['kernel'] * variables['masks']['dense2']['kernel']
        np.testing.assert_array_equal(state_dict['7.weight'], dense.T)


def test_prune_freezes_weights_and_finetune_freezes_masks(finished):
    workdir, _ = finished
    pretrained = weights(workdir / 'pretrain')
    pruned = weights(workdir / 'density_0.1/hydra/prune')
    finetuned = weights(workdir / 'density_0.1/hydra/finetune')
    lwm = weights(workdir / 'density_0.1/lwm/finetune')
    assert_same(pruned['params'], pretrained['params'])
    assert_same(finetuned['masks'], pruned['masks'])
    assert_same(finetuned['scores'], pruned['scores'])
    learned, largest = (jax.tree.leaves(v['masks']) for v in (pruned, lwm))
    assert any(np.any(a != b) for a, b in zip(learned, largest, strict=True))
    for layer, masks in lwm['masks'].items():
        magnitudes = np.abs(pretrained['params'][layer]['kernel'])
        kept = masks['kernel'] == 1
        assert magnitudes[kept].min() >= magnitudes[~kept].max()
        assert np.any(finetuned['params'][layer]['kernel'] != pruned['params'][layer]['kernel'])


def test_metrics_and_report(finished):
    workdir, _ = finished
    for part in ('pretrain', 'density_0.5/hydra/prune', 'density_0.1/lwm/finetune'):
        lines = read_jsonl(workdir / part / 'metrics.jsonl')
        assert [line['epoch'] for line in lines] == list(range(1, 9 if part == 'pretrain' else 5))
        for line in lines:
            assert {
                'step',
                'loss',
                'accuracy',
                'robust_accuracy',
                'learning_rate',
                'images_per_second',
                'validation_accuracy',
                'validation_robust_accuracy',
            } < set(line)
    page = (workdir / 'report/index.html').read_text()
    assert 'PGD-3' in page and 'data:image/svg+xml;base64' in page


def test_the_same_command_redoes_nothing(finished, tiny_config, tmp_path):
    """The cards, too, say what they said: by which commit the networks were measured."""
    workdir, result = finished
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    for name in NETWORKS:
        dated(copy / f'export/{name}.json')

    def files():
        return {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}

    before = files()
    assert pipeline.run(tiny_config(), copy) == result
    assert files() == before


def dated(card):
    """Makes a card one of an earlier commit."""
    card.write_text(json.dumps(json.loads(card.read_text()) | {'commit': 'earlier'}))


def launch(config, workdir):
    """The command line, with every field given as a flag of the embedded config."""
    flags = []

    def add(section, prefix):
        for name, value in section.items():
            if hasattr(value, 'items'):
                add(value, f'{prefix}{name}.')
            else:
                flags.append(f'--config.{prefix}{name}={value}')

    add(config, '')
    return subprocess.Popen(
        [sys.executable, 'main.py', '--config=configs/digits.py', f'--workdir={workdir}', *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process, timeout=300):
    """Waits until a phase has logged its first epoch."""
    end = time.monotonic() + timeout
    while not read_jsonl(path / 'metrics.jsonl'):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f'{path} did not begin'
        time.sleep(0.02)


def test_killed_and_stopped_runs_end_with_the_same_weights(finished, tiny_config, tmp_path):
    config = tiny_config()
    config.densities, config.phases = (0.5,), 'pretrain,prune,finetune'
    workdir = tmp_path / 'killed'
    twice, once = (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)
    for part, signals in (('pretrain', twice), ('density_0.5/hydra/prune', once)):
        process = launch(config, workdir)
        wait_for(workdir / part, process)
        for number in signals:
            process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        # The second one ends the run at once, if it comes while the first is worked on.
        assert process.returncode == 0 or signals is twice, output
        assert 'Traceback' not in output
        assert not checkpoint.is_finished(workdir / part)
        assert 'the same command goes on' in output
        assert not (workdir / 'lock').exists()

    process = launch(config, workdir)
    wait_for(workdir / 'density_0.5/hydra/finetune', process)
    with pytest.raises(ValueError, match=f'in use by process {process.pid}'):
        pipeline.run(config, workdir)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not checkpoint.is_finished(workdir / 'density_0.5/hydra/finetune')

    process = launch(config, workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for part in (
        'pretrain',
        'density_0.5/hydra/prune',
        'density_0.5/hydra/finetune',
        'density_0.5/lwm/finetune',
    ):
        assert_same(weights(workdir / part), weights(finished[0] / part))
        steps = [line['step'] for line in read_jsonl(workdir / part / 'metrics.jsonl')]
        assert steps == sorted(set(steps))  # the killed run's lines do not stay beside the new


def test_a_network_that_only_guesses_is_told_of(tiny_config, tmp_path, capsys):
    config = tiny_config()
    config.phases = 'pretrain'
    config.pretrain.update(epochs=1, learning_rate=1e-9)
    pipeline.run(config, tmp_path)
    assert 'does no better than guessing' in capsys.readouterr().out


def test_parts_from_a_source(finished, tiny_config, tmp_path):
    """One phase in a workdir of its own, from another run's network, then the next."""
    config = tiny_config()
    config.densities = (0.5,)
    config.phases, config.methods = 'prune', 'hydra'
    config.source = str(finished[0] / 'pretrain')
    pipeline.run(config, tmp_path)
    assert_same(
        weights(tmp_path / 'density_0.5/hydra/prune'),
        weights(finished[0] / 'density_0.5/hydra/prune'),
    )
    assert not (tmp_path / 'pretrain').exists()

    config.phases, config.source = 'finetune,evaluate', ''
    result = pipeline.run(config, tmp_path)
    assert [network['name'] for network in result['networks']] == ['hydra_0.5']


def test_an_unfinished_source_is_refused(finished, tiny_config, tmp_path):
    source = shutil.copytree(finished[0] / 'pretrain', tmp_path / 'pretrain')
    shutil.rmtree(source / 'checkpoints/24')
    config = tiny_config()
    config.phases, config.source = 'prune', str(source)
    with pytest.raises(ValueError, match=r'pretrain is unfinished, at step 21 of 24: finish it'):
        pipeline.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_evaluation_only(finished, tiny_config, tmp_path):
    config = tiny_config()
    config.phases = 'evaluate'
    config.source = str(finished[0] / 'density_0.1/hydra/finetune/checkpoints')
    config.evaluate.pgd.restarts = 3
    (network,) = pipeline.run(config, tmp_path)['networks']
    once = next(n for n in finished[1]['networks'] if n['name'] == 'hydra_0.1')
    assert network['clean_accuracy'] == once['clean_accuracy']
    assert network['robust']['pgd']['accuracy'] <= once['robust']['pgd']['accuracy']
    assert network['robust']['pgd']['restarts'] == 3


def test_an_interrupted_evaluation_goes_on(finished, tiny_config, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    path = copy / 'examples/hydra_0.5.pgd.jsonl'
    cards = [copy / f'export/{name}.json' for name in ('lwm_0.5', 'hydra_0.5')]
    for card in cards:
        dated(card)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text(''.join(lines[:25]) + lines[25][:7])  # killed in the middle of a line
    pipeline.run(tiny_config(), copy)
    assert path.read_text() == whole
    kept, measured = (json.loads(card.read_text())['commit'] for card in cards)
    assert kept == 'earlier' != measured

    # Damaged lines, in another order: what they held is computed again, and joined by its index.
    path.write_text(''.join([lines[0], *lines[:0:-1], '[]\n']).replace(lines[3], '{"ind\n'))
    pipeline.run(tiny_config(), copy)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    shutil.copy(finished[0] / 'examples/hydra_0.5.pgd.jsonl', path)

    config = tiny_config()
    config.evaluate.pgd.steps = 4
    with pytest.raises(ValueError, match='steps: 3, 4'):
        pipeline.run(config, copy)
    assert path.read_text() == whole


def test_robust_mask_of_a_natural_network(tiny_config, tmp_path):
    config = tiny_config()
    config.densities = (0.5,)
    config.pretrain.objective = 'natural'
    config.phases = 'pretrain,prune,evaluate'
    config.evaluate.pruned = True
    names = [network['name'] for network in pipeline.run(config, tmp_path)['networks']]
    assert names == ['pretrain', 'hydra_0.5_pruned']
    assert 'robust_accuracy' not in read_jsonl(tmp_path / 'pretrain/metrics.jsonl')[0]
    assert 'robust_accuracy' in read_jsonl(tmp_path / 'density_0.5/hydra/prune/metrics.jsonl')[0]


def test_divergence_stops_and_keeps_what_is_saved(finished, tiny_config, tmp_path):
    config = tiny_config()
    config.source = str(finished[0] / 'pretrain')
    config.phases, config.methods = 'finetune', 'lwm'
    config.densities = (0.5,)
    config.finetune.update(learning_rate=1e25, warmup_epochs=1.0)
    config.log_every = 1
    with pytest.raises(
        FloatingPointError, match=r'lwm 0.5 finetune: the loss is not finite'
    ) as error:
        pipeline.run(config, tmp_path)
    logged = read_jsonl(
        tmp_path / 'density_0.5/lwm/finetune/metrics.jsonl'
    )  # steps as the log counts them
    assert f'at step {len(logged) + 1};' in str(error.value)
    saved = (
        weights(tmp_path / 'density_0.5/lwm/finetune')
        if list(tmp_path.glob('*/lwm/finetune/*/*'))
        else {}
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_checkpoint_every_decides_what_is_saved(tiny_config, tmp_path):
    config = tiny_config()
    config.arch, config.objective, config.phases = 'lin_1', 'natural', 'pretrain'
    config.checkpoint_every = 2
    # A linear network's weights grow 100 times a step: their norm overflows in the tenth of twelve.
    config.pretrain.update(
        epochs=4, learning_rate=1.0, momentum=0.0, weight_decay=100.0, schedule='constant'
    )
    with pytest.raises(FloatingPointError, match='the checkpoint of step 6 is kept'):
        pipeline.run(config, tmp_path)
    assert checkpoint.load_meta(tmp_path / 'pretrain')['step'] == 6


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'arch': 'mnist_modell'}, "'mnist_modell'.*mnist_model"),
        ({'objective': 'trade'}, "unknown config.objective 'trade': did you mean 'trades'"),
        ({'prune.objective': 'nat'}, 'unknown config.prune.objective'),
        ({'trades.beta': float('nan')}, 'config.trades.beta is nan: expected a finite number'),
        ({'densities': (0.1, 1.5)}, 'config.densities'),
        ({'densities': (0.0,)}, 'config.densities'),
        ({'phases': 'pretrain,prun'}, "'prun': did you mean 'prune'"),
        ({'dataset.num_classes': 2}, 'label'),
        ({'dataset.dir': 'nowhere.npz'}, 'nowhere.npz'),
        ({'pretrain.schedule': 'cos'}, 'unknown config.pretrain.schedule'),
        ({'evaluate.pgd.eps': 2.0}, 'config.evaluate.pgd.eps is 2.0: expected at most 1'),
        ({'phases': 'prune', 'source': 'nowhere'}, 'no checkpoint in nowhere'),
        ({'phases': 'prune'}, 'no checkpoint in .*pretrain'),
        ({'phases': 'prune', 'source': 'PRETRAIN', 'arch': 'cifar_model'}, 'arch'),
        ({'phases': 'prune', 'source': 'PRETRAIN', 'dataset.num_classes': 4}, 'num_classes: 3, 4'),
        ({'phases': 'prune', 'source': 'PRUNED'}, "phase: 'prune', 'pretrain'"),
        ({'phases': 'finetune', 'source': 'PRUNED'}, 'does not fit lwm'),
        ({'phases': 'finetune', 'source': 'PRUNED', 'densities': (0.2,)}, 'density: 0.5, 0.2'),
        ({'overrides': 'lwm.finetune.epoch=3'}, "'finetune.epoch': did you mean 'finetune.epochs'"),
        ({'overrides': 'lwn.finetune.epochs=3'}, "method in config.overrides 'lwn'"),
        ({'overrides': 'lwm.finetune.epochs=0'}, 'finetune.epochs is 0'),
        ({'overrides': 'lwm'}, 'expected METHOD.FIELD=VALUE'),
        ({'methods': 'hydra,lvm'}, "config.methods 'lvm': did you mean 'lwm'"),
        ({'source': 'PRETRAIN'}, 'starts from scratch'),
        ({'pruning.structure': 'n_of_m'}, r'densities is \(0.5, 0.1\): expected n / m'),
        ({'pruning.allocation': 'learned'}, 'learned only where scores are'),
        ({'pruning.allocation': 'erk', 'densities': (0.0001,)}, 'density 0.0001 keeps'),
        ({'pruning.structure': 'n_of_m', 'densities': (0.5,)}, 'conv1/kernel has 1 inputs'),
        ({'pruning.counts': 'multiply_adds'}, 'weights, unless the structure is channels'),
        ({'pruning.structure': 'channels', 'densities': (1e-4,)}, 'one channel of each layer'),
        ({'finetune.warmup_epochs': 3.9}, 'is 3.9: it takes all 12 steps of hydra 0.5 finetune'),
    ],
)
def test_errors_before_training(finished, tiny_config, tmp_path, change, message):
    config = tiny_config()
    places = {'PRETRAIN': 'pretrain', 'PRUNED': 'density_0.5/hydra/prune'}
    for field, value in change.items():
        if value in places:
            value = str(finished[0] / places[value])
        *sections, name = field.split('.')
        section = config
        for key in sections:
            section = section[key]
        section[name] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        pipeline.run(config, tmp_path)
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())  # so that the corrected command is not refused


def test_another_experiments_workdir_is_refused(finished, tiny_config):
    config = tiny_config()
    config.prune.learning_rate = 0.07
    with pytest.raises(ValueError, match=r'another experiment.*prune.learning_rate: 0.1, 0.07'):
        pipeline.run(config, finished[0])


def test_a_workdir_from_before_a_field_existed_goes_on(finished, tiny_config, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / 'config.json').read_text())
    del saved['smooth']['samples'], saved['mixtrain']
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    assert pipeline.run(tiny_config(), tmp_path)['networks'] == finished[1]['networks']


def test_a_sparse_network_is_trained_from_scratch(tiny_config, tmp_path):
    """SNIP's mask on the network as it is drawn, whose weights grow by 1 / sqrt(density)."""
    config = tiny_config()
    config.phases, config.densities = 'pretrain,finetune,evaluate', (0.25,)
    config.methods, config.pretrain.epochs = 'snip', 0
    config.pruning.rescale = True
    config.finetune.update(epochs=1, learning_rate=1e-9)
    networks = {n['name']: n for n in pipeline.run(config, tmp_path)['networks']}
    assert list(networks) == ['pretrain', 'snip_0.25']
    drawn, sparse = weights(tmp_path / 'pretrain'), weights(tmp_path / 'density_0.25/snip/finetune')
    for layer, masks in sparse['masks'].items():
        mask = masks['kernel']
        assert mask.sum() == kept_count(mask.size, 0.25)
        np.testing.assert_allclose(
            sparse['params'][layer]['kernel'] * mask,
            2 * drawn['params'][layer]['kernel'] * mask,
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip
    magnitudes = np.abs(drawn['params']['conv1']['kernel'])
    kept = sparse['masks']['conv1']['kernel'].astype(bool)
    assert magnitudes[kept].min() < magnitudes[~kept].max()  # not the largest
    config.phases, config.source = 'evaluate', str(tmp_path / 'density_0.25/snip/finetune')
    (network,) = pipeline.run(config, tmp_path / 'evaluated')['networks']
    assert network['name'] == 'snip_0.25'
    page = (tmp_path / 'report/index.html').read_text()
    assert 'SNIP' in page
    assert 'no training curves' not in page  # nothing is missing: it was not trained


def test_a_damaged_checkpoint_is_made_again_from_the_one_before(
    finished, tiny_config, tmp_path, capsys
):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    newest = copy / 'density_0.5/lwm/finetune/checkpoints/12'
    file = max((newest / 'variables').rglob('*'), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    config = tiny_config()
    config.phases, config.methods = 'finetune', 'lwm'
    pipeline.run(config, copy)
    out = capsys.readouterr().out
    assert (
        f'{file} is damaged' in out
        and 'lwm 0.5 finetune  step 12/12' in out
        and 'step 9/' not in out
    )
    assert_same(
        weights(copy / 'density_0.5/lwm/finetune'),
        weights(finished[0] / 'density_0.5/lwm/finetune'),
    )


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('config.json', '{"arch": "mnist_mo'),
        ('config.json', '{}'),
        ('config.json', '[1]'),
        ('config.json', '{"pretrain": 5}'),
        ('result.json', ''),
        ('result.json', '[]'),
        ('result.json', '{"networks": [3]}'),
    ],
)
def test_a_damaged_file_of_the_run_is_named_before_training(tiny_config, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f'{name} is damaged .*: move it away') as error:
        pipeline.run(tiny_config(), tmp_path)
    assert '\n' not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_densities_that_print_alike_are_trained_apart(finished, tiny_config, tmp_path):
    config = tiny_config()
    config.phases, config.methods = 'finetune', 'lwm'
    config.densities = (1 / 3, 0.333333)
    config.source = str(finished[0] / 'pretrain')
    config.finetune.epochs = 1
    pipeline.run(config, tmp_path)
    parts = sorted(path.name for path in tmp_path.glob('density_*'))
    assert parts == ['density_0.333333', 'density_0.3333333333333333']
    kept = [checkpoint.load_meta(tmp_path / part / 'lwm/finetune')['density'] for part in parts]
    assert kept == [0.333333, 1 / 3]


def test_a_method_has_settings_of_its_own_and_joins_a_workdir_later(
    finished, tiny_config, tmp_path
):
    config = tiny_config()
    config.densities, config.methods = (0.5,), 'random'
    config.overrides = 'random.finetune.epochs=1'
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    names = [network['name'] for network in pipeline.run(config, copy)['networks']]
    assert names == [*NETWORKS, 'random_0.5']
    meta = checkpoint.load_meta(copy / 'density_0.5/random/finetune')
    assert (meta['method'], meta['criterion'], meta['step']) == ('random', 'kaiming_uniform', 3)
    config.overrides = 'random.finetune.epochs=2'
    with pytest.raises(ValueError, match=r"overrides.random.finetune.epochs: '1', '2'"):
        pipeline.run(config, copy)


def test_what_version_0_1_left_ends_in_one_line(finished, tiny_config, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    saved = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps({**saved, 'lwm': saved['finetune']}))
    with pytest.raises(ValueError, match=r'a run of robustprune_jax 0.1.*choose a new --workdir'):
        pipeline.run(tiny_config(), copy)
    meta = {**checkpoint.load_meta(copy / 'pretrain'), 'score_init': None}
    del meta['method']
    with checkpoint.Checkpoints(tmp_path / 'old') as checkpoints:
        checkpoints.save_items(1, {'variables': weights(copy / 'pretrain'), 'meta': meta})
    with pytest.raises(ValueError, match=r'was saved by robustprune_jax 0.1: its conversion'):
        checkpoint.load(tmp_path / 'old')


def test_a_network_of_ones_own(tiny_config, tmp_path):
    """By its import path alone: trained, exported, and found again by the commands."""
    config = tiny_config()
    config.arch, config.objective = 'own_network:Net', 'natural'
    config.methods, config.densities = 'lwm', (0.5,)
    for phase in ('pretrain', 'finetune'):
        config[phase].epochs = 1
    networks = pipeline.run(config, tmp_path)['networks']
    assert networks[1]['layers'] == {'conv': [18, 36], 'head': [6, 12]}
    folder = tmp_path / 'density_0.5/lwm/finetune'
    names = list(load_pth(tmp_path / 'export/lwm_0.5.pth.tar')['state_dict'])
    assert {'conv/kernel', 'head/kernel', 'bn/scale', 'bn/var'} < set(names)
    module, variables = zoo.load(folder)
    assert module.apply(variables, np.zeros((1, 12, 12, 1))).shape == (1, 3)
    to_onnx.main(['--checkpoint', str(folder), '--out', str(tmp_path / 'net.onnx')])
    table = [['a', 'conv', 'conv', True], ['b', 'bn', 'norm', True], ['c', 'head', 'dense', True]]
    (tmp_path / 'names.json').write_text(json.dumps(table))
    out, given = str(tmp_path / 'net.pth'), ['--names', str(tmp_path / 'names.json')]
    to_torch.main(['--checkpoint', str(folder), '--out', out, *given])
    back = [*given, '--arch', config.arch, '--image_size', '12', '--out', str(tmp_path / 'back')]
    from_torch.main(['--pth', out, *back])
    again, meta = checkpoint.load(tmp_path / 'back')
    assert (meta['arch'], meta['image_shape']) == (config.arch, [12, 12, 1])
    assert_same(again['masks'], variables['masks'])
    assert_same(again['params'], variables['params'])


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        ('own_network:Nett', r"config.arch is 'own_network:Nett': .*cannot be imported"),
        ('no_such.package:Net', 'cannot be imported .*PYTHONPATH'),
        ('own_network:WithoutTrain', 'no Flax module with __call__'),
        ('json:loads', 'no Flax module'),
    ],
)
def test_what_is_no_network_is_refused(tiny_config, arch, message):
    config = tiny_config()
    config.arch = arch
    with pytest.raises(ValueError, match=message) as error:
        rules.check(config)
    assert '\n' not in str(error.value)
