import collections
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from conversion import load_pth, save_pth
from conversion.files import read_checkpoint, write_checkpoint
from conversion.unpickle import LEGACY_MAGIC


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


@pytest.mark.parametrize('zip_format', [True, False])
def test_we_read_torchs_files(tmp_path, zip_format):
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
        _use_new_zipfile_serialization=zip_format,
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
    for damaged, what in (
        (whole[: len(whole) // 2], 'truncated'),
        (b'', 'no PyTorch checkpoint'),
        (b'something else', 'no PyTorch checkpoint'),
        (LEGACY_MAGIC, 'damaged'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf'a\.pth is {what}'):
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


def test_legacy_files_cut_short_are_refused(tmp_path):
    torch = pytest.importorskip('torch')
    path = tmp_path / 'a.pth'
    torch.save({'a': torch.ones(100)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'a\.pth: truncated'):
        load_pth(path)


def test_safetensors_keep_strides_and_dtypes(tmp_path):
    path = tmp_path / 'a.safetensors'
    arrays = {k: a for k, a in contents()['state_dict'].items() if k != 'empty'}
    write_checkpoint(path, arrays, {'arch': 'x', 'optimizer': {}})
    found, fields = read_checkpoint(path)
    assert fields == {'arch': 'x', 'format': 'pt'}
    assert_same_tree({name: found[name] for name in arrays}, dict(arrays))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r'a\.safetensors is no safetensors file, or damaged'):
        read_checkpoint(path)
