import collections
import os
import pickle
import zipfile

import golden
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from conversion import export_state_dict, import_state_dict, load_pth, save_pth, to_torch
from conversion.names import TABLES
from conversion.scores import top_mask
from conversion.to_torch import export_checkpoint
from robustprune_jax import checkpoint
from robustprune_jax.masks import apply_masks, topk_masks
from robustprune_jax.models import create_model

MASKED = [arch for arch in TABLES if 'kept' in golden.ARCHITECTURES[arch]]


def assert_same_state_dict(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def apply(arch, variables, images):
    """Logits in eval mode, masks applied."""
    module = create_model(arch, golden_classes(arch), mean=None, std=None)
    params = apply_masks(variables['params'], variables.get('masks', {}))
    used = {'params': params, 'batch_stats': variables.get('batch_stats', {})}
    return np.asarray(_apply(module, used, images))


_apply = jax.jit(
    lambda module, variables, images: module.apply(variables, images), static_argnums=0
)


def golden_classes(arch):
    return list(golden.recorded_shapes(arch).values())[-1][0]


def assert_recorded(logits, recorded):
    recorded = np.array(recorded).reshape(len(logits), -1)
    tolerance = 1e-4 * np.abs(recorded).max()
    np.testing.assert_allclose(logits[:, : recorded.shape[1]], recorded, rtol=0, atol=tolerance)


@pytest.mark.parametrize('arch', TABLES)
def test_imported_networks_give_the_recorded_logits(arch):
    record = golden.ARCHITECTURES[arch]
    images = golden.formula_images(tuple(record['input']))
    variables = import_state_dict(golden.formula_state_dict(arch), arch)
    assert_recorded(apply(arch, variables, images), record['logits'])
    if arch not in MASKED:
        return
    masked = golden.formula_state_dict(arch, 'subnet')
    for density, logits in record['masked_logits'].items():
        variables = import_state_dict(masked, arch, density=float(density))
        assert_recorded(apply(arch, variables, images), logits)


@pytest.mark.parametrize('arch', TABLES)
def test_export_undoes_import_bit_for_bit(arch):
    """Names, their order, shapes and values; with scores and without."""
    state_dict = golden.formula_state_dict(arch)
    assert_same_state_dict(export_state_dict(import_state_dict(state_dict, arch), arch), state_dict)
    if arch in MASKED:
        state_dict = golden.formula_state_dict(arch, 'subnet')
        variables = import_state_dict(state_dict, arch, density=0.1)
        assert_same_state_dict(export_state_dict(variables, arch, layout='subnet'), state_dict)


@pytest.mark.parametrize('arch', MASKED)
def test_dense_export_keeps_the_recorded_counts(arch):
    state_dict = golden.formula_state_dict(arch, 'subnet')
    for density, kept in golden.ARCHITECTURES[arch]['kept'].items():
        variables = import_state_dict(state_dict, arch, density=float(density))
        exported = export_state_dict(variables, arch)
        counts = {layer: np.count_nonzero(exported[f'{layer}.weight']) for layer in kept}
        assert counts == kept, density


def test_masks_are_those_of_topk_masks_with_ties():
    scores = np.random.default_rng(0).integers(-3, 4, (40, 30)).astype(np.float32)
    for density in (0.01, 0.3, 0.9, 1.0):
        expected = topk_masks({'kernel': scores}, density)['kernel']
        found = top_mask(scores, int(expected.sum()))
        np.testing.assert_array_equal(found, expected)


def test_networks_born_here_get_what_torch_registers():
    """sub_block1 as a new network has it, the same at every export, pruned as far as block1."""
    variables = import_state_dict(golden.formula_state_dict('wrn_28_1'), 'wrn_28_1')
    del variables['unused']
    exported = export_state_dict(variables, 'wrn_28_1')
    assert list(exported) == list(golden.recorded_shapes('wrn_28_1'))
    assert_same_state_dict(export_state_dict(variables, 'wrn_28_1'), exported)
    dead = exported['sub_block1.layer.0.conv2.weight']
    assert abs(dead.std() / np.sqrt(2 / (9 * 16)) - 1) < 0.1
    assert (exported['sub_block1.layer.3.bn1.running_var'] == 1).all()
    count = exported['bn1.num_batches_tracked']
    assert (count.dtype, count.shape, count) == (np.int64, (), 0)

    masks = topk_masks(
        {'block1_layer0': {'conv2': variables['params']['block1_layer0']['conv2']}}, 0.1
    )
    exported = export_state_dict({**variables, 'masks': masks}, 'wrn_28_1')
    for block in ('block1', 'sub_block1'):
        assert np.count_nonzero(exported[f'{block}.layer.0.conv2.weight']) == 231
    again = import_state_dict(exported, 'wrn_28_1', num_classes=10)
    assert_same_state_dict(export_state_dict(again, 'wrn_28_1'), exported)


def test_data_parallel_prefixes_and_absent_counterparts():
    state_dict = golden.formula_state_dict('wrn_28_1')
    stripped = {
        f'module.{name}': array
        for name, array in state_dict.items()
        if 'sub_block1' not in name and 'num_batches' not in name
    }
    variables = import_state_dict(stripped, 'wrn_28_1')
    assert 'unused' not in variables
    assert list(export_state_dict(variables, 'wrn_28_1')) == list(state_dict)


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        (lambda s: s.pop('0.bias'), {}, 'missing 0.bias'),
        (lambda s: s.update({'9.weight': s['7.weight']}), {}, 'unexpected 9.weight'),
        (lambda s: s.update({'2.weight': np.zeros((32, 16, 3, 3))}), {}, r'2.weight \(has shape'),
        (lambda s: s.update({'5.weight': np.zeros((100, 2049))}), {}, r'expected \(100, 2048\)'),
        (lambda s: s['2.bias'].fill(np.nan), {}, 'NaN or infinity in 2.bias'),
        (lambda s: None, {'num_classes': 100}, 'has 10 classes, not 100'),
        (lambda s: None, {'density': 0.1}, 'no popup_scores'),
    ],
)
def test_bad_state_dicts_are_named(change, options, message):
    state_dict = golden.formula_state_dict('cifar_model')
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        import_state_dict(state_dict, 'cifar_model', **options)


def test_masked_checkpoints_need_a_density_and_others_name_their_architecture():
    state_dict = golden.formula_state_dict('cifar_model', 'subnet')
    with pytest.raises(ValueError, match='does not say its density'):
        import_state_dict(state_dict, 'cifar_model')
    with pytest.raises(ValueError, match=r'those of wrn_28_1$'):
        import_state_dict(golden.formula_state_dict('wrn_28_1'), 'wrn_28_4')
    with pytest.raises(ValueError, match=r'missing.*unexpected.*those of vgg4_bn$'):
        import_state_dict(golden.formula_state_dict('vgg4_bn'), 'wrn_28_4')


def test_variables_of_another_network_are_refused():
    variables = import_state_dict(golden.formula_state_dict('cifar_model'), 'cifar_model')
    with pytest.raises(ValueError, match='not the variables of cifar_model_large: missing'):
        export_state_dict(variables, 'cifar_model_large')
    with pytest.raises(ValueError, match='have none'):
        export_state_dict(variables, 'cifar_model', layout='subnet')


# ---- files ----


def contents():
    return {
        'epoch': 3,
        'arch': 'a name, é',
        'state_dict': collections.OrderedDict(
            weight=np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
            tracked=np.array(7),
            empty=np.zeros((0, 3)),
            half=np.arange(5).astype(ml_dtypes.bfloat16),
            flags=np.array([True, False]),
        ),
        'best_prec1': 88.97,
        'optimizer': {'groups': [1, -(2**70), (None, True), {}]},
    }


def assert_same_tree(found, expected):
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected) and type(found) is type(expected)
        for key in expected:
            assert_same_tree(found[key], expected[key])
    else:
        assert found == expected and type(found) is type(expected)


def test_files_are_read_back_as_written(tmp_path):
    save_pth(tmp_path / 'a.pth.tar', contents())
    assert_same_tree(load_pth(tmp_path / 'a.pth.tar'), contents())
    assert os.listdir(tmp_path) == ['a.pth.tar']


@pytest.mark.parametrize('mmap', [False, True])
def test_torch_reads_our_files(tmp_path, mmap):
    torch = pytest.importorskip('torch')
    save_pth(tmp_path / 'a.pth.tar', contents())
    loaded = torch.load(tmp_path / 'a.pth.tar', weights_only=True, mmap=mmap)
    half = loaded['state_dict'].pop('half')
    assert half.dtype == torch.bfloat16 and half.float().tolist() == [0, 1, 2, 3, 4]
    loaded['state_dict'] = collections.OrderedDict(
        (name, tensor.numpy()) for name, tensor in loaded['state_dict'].items()
    )
    expected = contents()
    del expected['state_dict']['half']
    assert_same_tree(loaded, expected)


def test_we_read_torchs_files(tmp_path):
    """Views, shared storage, parameters, and the numpy scalars that the original's files hold."""
    torch = pytest.importorskip('torch')
    base = torch.arange(12.0).reshape(3, 4)
    layer = torch.nn.BatchNorm1d(4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(base).square().sum().backward()
    optimizer.step()
    torch.save(
        {
            'state_dict': layer.state_dict(),
            'optimizer': optimizer.state_dict(),
            'best_prec1': np.float64(3.5),
            'transposed': base.t()[1:, 1:],
            'parameter': torch.nn.Parameter(base[:, ::2]),
            'half': torch.ones(3, dtype=torch.bfloat16),
            'bytes': b'\x00\xff',
        },
        tmp_path / 'a.pth',
    )
    loaded = load_pth(tmp_path / 'a.pth')
    np.testing.assert_array_equal(loaded['transposed'], base.numpy().T[1:, 1:])
    np.testing.assert_array_equal(loaded['parameter'], base.numpy()[:, ::2])
    assert loaded['transposed'].base is not None and loaded['half'].dtype == ml_dtypes.bfloat16
    assert loaded['best_prec1'] == 3.5 and loaded['bytes'] == b'\x00\xff'
    assert loaded['state_dict']['num_batches_tracked'].shape == ()
    buffer = optimizer.state_dict()['state'][0]['momentum_buffer'].numpy()
    np.testing.assert_array_equal(loaded['optimizer']['state'][0]['momentum_buffer'], buffer)


def zip_of(path, data_pkl):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', data_pkl)
        archive.writestr('archive/data/0', bytes(16))
    return path


def test_pickle_bombs_are_refused_unexecuted(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'boom'),)

    path = zip_of(tmp_path / 'a.pth', pickle.dumps({'state_dict': Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r'a\.pth: the file asks for posix\.mkdir, which is'):
        load_pth(path)
    assert not (tmp_path / 'boom').exists()


def test_tensors_cannot_reach_beyond_their_storage(tmp_path):
    tensor = (
        b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n'
        b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x01K\x04\x85K\x01\x85\x89}tR.'
    )
    with pytest.raises(ValueError, match='reaches beyond its storage'):
        load_pth(zip_of(tmp_path / 'a.pth', tensor))
    np.testing.assert_array_equal(
        load_pth(zip_of(tmp_path / 'a.pth', tensor.replace(b'K\x04\x85', b'K\x03\x85'))),
        np.zeros(3),
    )


def test_damaged_files_give_one_clear_error(tmp_path):
    path = tmp_path / 'a.pth'
    save_pth(path, contents())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b'', b'not a checkpoint'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'a\.pth is truncated, or is no PyTorch checkpoint'):
            load_pth(path)
    path.write_bytes(whole.replace(np.float32(23).tobytes(), np.float32(22).tobytes()))
    with pytest.raises(ValueError, match=r'a\.pth is damaged'):
        load_pth(path)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ({'a': [object()]}, r"checkpoint\['a'\]\[0\] is a object"),
        ({'a': np.zeros(2, np.complex64)}, r"checkpoint\['a'\] has dtype complex64"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_no_file(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        save_pth(tmp_path / 'a.pth', value)
    assert os.listdir(tmp_path) == []


# ---- networks in files ----


def torch_mnist_model():
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def test_exported_network_computes_the_same_in_plain_torch(tmp_path):
    torch = pytest.importorskip('torch')
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    variables = create_model('mnist_model').init(jax.random.key(0, impl='rbg'), images)
    variables['masks'] = topk_masks(
        {layer: {'kernel': leaves['kernel']} for layer, leaves in variables['params'].items()}, 0.05
    )
    meta = {'arch': 'mnist_model', 'epoch': 8}
    summary = export_checkpoint(variables, meta, tmp_path / 'a.pth.tar')
    assert summary['tensors'] == 8 and summary['parameters'] == 166_406
    assert summary['kept'] == 8313 and summary['bytes'] == os.path.getsize(tmp_path / 'a.pth.tar')

    saved = torch.load(tmp_path / 'a.pth.tar', weights_only=True)
    assert list(saved) == ['epoch', 'arch', 'state_dict', 'best_prec1', 'optimizer']
    network = torch_mnist_model()
    network.load_state_dict(saved['state_dict'], strict=True)
    expected = network(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    assert sum(int((p != 0).sum()) for p in network.parameters() if p.ndim > 1) == 8313
    logits = apply('mnist_model', variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_masked_batch_norm_network_survives_the_file(tmp_path):
    state_dict = golden.formula_state_dict('vgg2_bn', 'subnet')
    variables = import_state_dict(state_dict, 'vgg2_bn', density=0.1)
    export_checkpoint(variables, {'arch': 'vgg2_bn'}, tmp_path / 'a.pth.tar', layout='subnet')
    loaded = load_pth(tmp_path / 'a.pth.tar')['state_dict']
    again = import_state_dict(loaded, 'vgg2_bn', density=0.1)
    same = jax.tree.map(np.array_equal, variables, again)
    assert all(flatten_dict(same).values())


def test_to_torch_writes_a_checkpoint_and_says_what(tmp_path, capsys):
    state_dict = golden.formula_state_dict('wrn_28_1', 'subnet')
    variables = import_state_dict(state_dict, 'wrn_28_1', density=0.05)
    meta = {'arch': 'wrn_28_1', 'num_classes': 10, 'phase': 'prune', 'density': 0.05}
    checkpoint.save_network(tmp_path / 'run', variables, meta)
    out = tmp_path / 'a.pth.tar'
    to_torch.main(['--checkpoint', f'{tmp_path / "run"}', '--out', f'{out}', '--layout', 'subnet'])
    assert_same_state_dict(load_pth(out)['state_dict'], state_dict)
    printed = capsys.readouterr().out
    assert 'wrn_28_1, subnet layout, 238 tensors, 388,186 parameters, density 0.05' in printed
    with pytest.raises(SystemExit, match='to_torch: no checkpoint in'):
        to_torch.main(['--checkpoint', f'{tmp_path / "none"}', '--out', f'{out}'])
