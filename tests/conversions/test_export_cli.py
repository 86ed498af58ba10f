import importlib
import json
import os

import golden
import jax
import numpy as np
import pytest
from networks import drawn

from conversion import from_torch, import_state_dict, load_pth, save_pth, to_torch
from conversion.files import read_checkpoint
from conversion.from_torch import import_checkpoint
from conversion.names import read_table
from conversion.to_torch import export_checkpoint
from robustprune_jax import zoo
from robustprune_jax.models import create_model
from robustprune_jax.pruning import effective_params, init_scores, sparsity, topk_masks
from robustprune_jax.training import checkpoint


def torch_mnist_model():
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def test_exported_network_computes_the_same_in_plain_torch(tmp_path):
    torch = pytest.importorskip('torch')
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    state_dict = golden.formula_state_dict('mnist_model', 'subnet')
    variables = import_state_dict(state_dict, 'mnist_model', density=0.05)
    meta = {'arch': 'mnist_model', 'epoch': 8}
    summary = export_checkpoint(variables, meta, tmp_path / 'a.pth.tar')
    assert summary['tensors'] == 8 and summary['parameters'] == 166_406
    assert summary['kept'] == 8313 and summary['bytes'] == os.path.getsize(tmp_path / 'a.pth.tar')

    saved = torch.load(tmp_path / 'a.pth.tar', weights_only=True)
    assert set(saved) == {'epoch', 'arch', 'state_dict', 'best_prec1', 'optimizer'}
    network = torch_mnist_model()
    network.load_state_dict(saved['state_dict'], strict=True)
    expected = network(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    assert sum(int((p != 0).sum()) for p in network.parameters() if p.ndim > 1) == 8313
    logits = golden.logits('mnist_model', variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_masked_batch_norm_network_survives_the_file(tmp_path):
    state_dict = golden.formula_state_dict('vgg2_bn', 'subnet')
    variables = import_state_dict(state_dict, 'vgg2_bn', density=0.1)
    export_checkpoint(variables, {'arch': 'vgg2_bn'}, tmp_path / 'a.pth.tar', layout='subnet')
    loaded = load_pth(tmp_path / 'a.pth.tar')['state_dict']
    again = import_state_dict(loaded, 'vgg2_bn', density=0.1)
    same = jax.tree.map(np.array_equal, variables, again)
    assert all(jax.tree.leaves(same))


def test_to_torch_writes_a_checkpoint_and_says_what(tmp_path, capsys):
    state_dict = golden.formula_state_dict('wrn_28_1', 'subnet')
    variables = import_state_dict(state_dict, 'wrn_28_1', density=0.05)
    meta = {'arch': 'wrn_28_1', 'num_classes': 10, 'phase': 'prune', 'density': 0.05}
    checkpoint.save_network(tmp_path / 'run', variables, meta)
    out = tmp_path / 'a.pth.tar'
    to_torch.main(['--checkpoint', f'{tmp_path / "run"}', '--out', f'{out}', '--layout', 'subnet'])
    golden.assert_same_state_dict(load_pth(out)['state_dict'], state_dict)
    printed = capsys.readouterr().out
    assert 'wrn_28_1, 238 tensors, 388,186 parameters, density 0.05004 (' in printed
    assert f'{out.stat().st_size:,} bytes, subnet layout for hydra' in printed
    with pytest.raises(SystemExit, match='to_torch: unknown network, neither'):
        to_torch.main(['--checkpoint', f'{tmp_path / "none"}', '--out', f'{out}'])


def test_the_compacted_network_is_a_file_of_layers(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip('torch')
    out = tmp_path / 'small.pth'
    to_torch.main(['--checkpoint', 'fashion_trades_0.01', '--out', f'{out}', '--compact'])
    assert f'for Network in {tmp_path / "small.py"}' in capsys.readouterr().out
    assert out.stat().st_size < 40_000
    monkeypatch.syspath_prepend(tmp_path)
    network = importlib.import_module('small').Network()
    network.load_state_dict(torch.load(out, weights_only=True))
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    module, variables = zoo.load('fashion_trades_0.01')
    expected = module.apply(variables, images)
    found = network(torch.tensor(images.transpose(0, 3, 1, 2))).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_torchvisions_files_are_bare_state_dicts(tmp_path):
    state_dict = golden.formula_state_dict('ResNet18')
    variables = import_state_dict(state_dict, 'ResNet18')
    meta = {'arch': 'ResNet18'}
    export_checkpoint(variables, meta, tmp_path / 'a.pth', target='torchvision')
    golden.assert_same_state_dict(load_pth(tmp_path / 'a.pth'), state_dict)


def test_safetensors_files_say_the_same(tmp_path):
    safetensors_torch = pytest.importorskip('safetensors.torch')
    state_dict = golden.formula_state_dict('vgg2_bn')
    variables = import_state_dict(state_dict, 'vgg2_bn')
    meta = {'arch': 'vgg2_bn', 'epoch': 7}
    export_checkpoint(variables, meta, tmp_path / 'a.safetensors')
    found, fields = read_checkpoint(tmp_path / 'a.safetensors')
    golden.assert_same_state_dict({name: found[name] for name in state_dict}, state_dict)
    assert (fields['arch'], fields['epoch']) == ('vgg2_bn', '7')
    tensors = safetensors_torch.load_file(tmp_path / 'a.safetensors')
    np.testing.assert_array_equal(tensors['features.0.weight'], state_dict['features.0.weight'])
    assert os.listdir(tmp_path) == ['a.safetensors']


def test_a_network_of_ones_own_is_written_under_its_own_names(tmp_path):
    variables = {'params': {'layer': {'kernel': np.ones((3, 2), np.float32), 'bias': np.ones(2)}}}
    meta = {'arch': 'mine'}
    export_checkpoint(variables, meta, tmp_path / 'a.pth')
    assert list(load_pth(tmp_path / 'a.pth')['state_dict']) == ['layer/kernel', 'layer/bias']
    (tmp_path / 'names.json').write_text(json.dumps([['fc', 'layer', 'dense', True]]))
    names = read_table(tmp_path / 'names.json')
    export_checkpoint(variables, meta, tmp_path / 'a.pth', names=names)
    assert list(load_pth(tmp_path / 'a.pth')['state_dict']) == ['fc.weight', 'fc.bias']
    (tmp_path / 'names.json').write_text('{"fc": "layer"}')
    with pytest.raises(ValueError, match=r'names\.json is no name table'):
        read_table(tmp_path / 'names.json')


# ---- from_torch ----


def test_from_torch_makes_a_checkpoint_that_evaluates_as_the_file(tmp_path, capsys):
    state_dict = golden.formula_state_dict('wrn_28_1', 'subnet')
    parallel = {f'module.{name}': array for name, array in state_dict.items()}
    fields = {'epoch': 9, 'arch': 'wrn_28_1', 'state_dict': parallel, 'best_prec1': 57.2}
    save_pth(tmp_path / 'a.pth.tar', fields)
    out = f'{tmp_path / "imported"}'
    from_torch.main(['--pth', f'{tmp_path / "a.pth.tar"}', '--density', '0.1', '--out', out])
    printed = capsys.readouterr().out
    assert 'wrn_28_1, 238 tensors, 388,186 parameters, density 0.1' in printed
    assert 'a checkpoint of phase finetune, 10 classes, images 32x32x3' in printed

    variables, meta = checkpoint.load(out)
    assert meta['density'] == 0.1 and meta['image_shape'] == [32, 32, 3] and meta['epoch'] == 9
    record = golden.ARCHITECTURES['wrn_28_1']
    images = golden.formula_images(tuple(record['input']))
    expected = np.array(record['masked_logits']['0.1']).reshape(2, 10)
    found = golden.logits('wrn_28_1', variables, images)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ('arch', 'image_shape'),
    [
        ('vgg4_without_maxpool', [32, 32, 3]),
        ('lin_2', [32, 32, 3]),
        ('vgg2_bn', [32, 32, 3]),
        ('ResNet18', [224, 224, 3]),
    ],
)
def test_the_architecture_is_found_from_the_tensors(tmp_path, arch, image_shape):
    save_pth(tmp_path / 'a.pt', golden.formula_state_dict(arch))
    _, meta, _ = import_checkpoint(tmp_path / 'a.pt')
    assert (meta['arch'], meta['image_shape']) == (arch, image_shape)
    assert (meta['phase'], meta['density']) == ('pretrain', None)


def test_a_network_whose_layers_keep_different_fractions_comes_in_with_its_masks(tmp_path):
    state_dict = golden.formula_state_dict('mnist_model')
    for name, every in (('2.weight', 3), ('5.weight', 20)):
        kept = np.arange(state_dict[name].size).reshape(state_dict[name].shape) % every == 0
        state_dict[name] = state_dict[name] * kept
    save_pth(tmp_path / 'a.pth', {'state_dict': state_dict, 'arch': 'mnist_model'})
    variables, meta, _ = import_checkpoint(tmp_path / 'a.pth', method='harp')
    layers = sparsity(variables)
    assert layers['conv1']['density'] == 1
    assert layers['conv2']['kept'] == np.count_nonzero(state_dict['2.weight'])
    assert (meta['phase'], meta['method']) == ('finetune', 'harp')
    assert meta['density'] == pytest.approx(layers['total']['density'], rel=0.01)


def test_a_few_dead_weights_are_no_pruning(tmp_path):
    state_dict = golden.formula_state_dict('mnist_model')
    state_dict['5.weight'] = state_dict['5.weight'].copy()
    state_dict['5.weight'][0] = 0  # a hundredth of the layer
    save_pth(tmp_path / 'a.pth', {'state_dict': state_dict, 'arch': 'mnist_model'})
    variables, meta, _ = import_checkpoint(tmp_path / 'a.pth')
    assert 'masks' not in variables
    assert (meta['phase'], meta['density']) == ('pretrain', None)


def cifar_model(**fields):
    return {'state_dict': golden.formula_state_dict('cifar_model'), 'arch': 'cifar_model', **fields}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (
            {'0.weight': np.zeros((2, 3), np.float32)},
            r'fit no known architecture: .*--names: \[\["0", "0", "dense", false, null, null\]\]',
        ),
        (golden.formula_state_dict('lin_3'), 'fit lin_3 and lin_4: give --arch'),
        ({'epoch': 3}, 'a.pth holds no state dict: epoch'),
        ([1], 'a.pth holds a list, not a state dict'),
        ({0: np.zeros((2, 3), np.float32)}, 'a.pth holds no state dict: 0'),
        (cifar_model(arch=[1]), 'fit mnist_model and cifar_model: give --arch'),
        (cifar_model(epoch=None), "a.pth: its field 'epoch' is no whole number"),
        (cifar_model(epoch=float('inf')), "a.pth: its field 'epoch' is no whole number"),
    ],
)
def test_unfit_files_end_in_one_line(tmp_path, content, message):
    save_pth(tmp_path / 'a.pth', content)
    with pytest.raises(SystemExit, match=f'^from_torch: .*{message}$'):
        from_torch.main(['--pth', f'{tmp_path / "a.pth"}', '--out', f'{tmp_path / "out"}'])
    assert not (tmp_path / 'out').exists()


# ---- tensors named by Flax paths ----


def own_file(tmp_path, arch, image_shape, **settings):
    """A network of one's own with masks, and the file that to_torch writes of it."""
    variables = drawn(create_model(arch, 5), image_shape)
    masks = init_scores(variables['params'], 'scaled')
    variables |= {'scores': masks, 'masks': topk_masks(masks, density=0.25)}
    export_checkpoint(variables, {'arch': arch}, tmp_path / 'own.pth.tar', **settings)
    return variables, str(tmp_path / 'own.pth.tar')


@pytest.mark.parametrize('layout', ['dense', 'subnet'])
def test_a_network_of_ones_own_comes_back_without_a_name_table(tmp_path, layout):
    """A dense layer behind the map says how large the images are."""
    variables, path = own_file(tmp_path, 'networks:Banded', (28, 28, 1), layout=layout)
    given = ['--arch', 'networks:Banded', '--density', '0.25', '--out', str(tmp_path / 'back')]
    from_torch.main(['--pth', path, *given])
    again, meta = checkpoint.load(tmp_path / 'back')
    assert (meta['num_classes'], meta['image_shape']) == (5, [28, 28, 1])
    if layout == 'dense':
        variables['params'] = effective_params(variables)
        del variables['scores']
    assert again.keys() == variables.keys()
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))


def test_only_the_network_of_the_paths_is_taken(tmp_path):
    _, path = own_file(tmp_path, 'own_network:Net', (12, 12, 1))
    given = {'density': 0.25, 'arch': 'own_network:Net'}
    _, meta, _ = import_checkpoint(path, **given, image_size=12)
    assert (meta['num_classes'], meta['image_shape']) == (5, [12, 12, 1])
    for change, message in (
        ({'arch': 'networks:Banded'}, 'not those of networks:Banded for images of 32, 28, 64, 224'),
        ({'arch': None}, r"\(arch: 'own_network:Net'\): give --arch"),
        ({'num_classes': 4}, r'head/bias \(has shape \(5,\), expected \(4,\)\)'),
    ):
        with pytest.raises(ValueError, match=message) as error:
            import_checkpoint(path, **{**given, **change})
        assert '\n' not in str(error.value)
