"""The whole job on small images: its files, its sources, each method with its settings."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import assert_same, weights

from conversion import from_torch, load_pth, to_onnx, to_torch
from robustprune_jax import pipeline, zoo
from robustprune_jax.pruning import kept_count
from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.training import checkpoint

NETWORKS = ['pretrain', 'hydra_0.5', 'lwm_0.5', 'hydra_0.1', 'lwm_0.1']


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
            assert network['kept'] == kept_count(sum(sizes), density)
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
    config.pruning.rescale = config.report = True
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
