import collections
import contextlib
import copy
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from conversion import load_pth, save_pth
from conversion.files import read_checkpoint, write_checkpoint
from conversion.torch_pickle import LEGACY_MAGIC
from robustprune_jax.runtime.array_pickle import load_arrays


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


def zip_of(path, data_pkl, data=bytes(16)):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', data_pkl)
        archive.writestr('archive/data/0', data)
    return path


def test_pickle_bombs_are_refused_unexecuted(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'boom'),)

    path = zip_of(tmp_path / 'a.pth', pickle.dumps({'state_dict': Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r'a\.pth: the file asks for posix\.mkdir, which is'):
        load_pth(path)
    assert not (tmp_path / 'boom').exists()


# four elements from the second on, of a storage of four
TENSOR = (
    b'ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n'
    b'X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x01K\x04\x85K\x01\x85\x89}tR'
)
STORAGE = TENSOR[TENSOR.index(b'(X') : TENSOR.index(b'Q') + 1]
EXPANDED = TENSOR.replace(b'K\x04\x85K\x01', b'J\x00\x00\x00\x40\x85K\x00')
REPEATED = TENSOR.replace(b'K\x04\x85K\x01', b'K\x03\x85K\x00')  # the second one thrice


def test_tensors_cannot_reach_beyond_their_storage(tmp_path):
    def load(tensor):
        return load_pth(zip_of(tmp_path / 'a.pth', tensor + b'.'))

    with pytest.raises(ValueError, match='reaches beyond its storage'):
        load(TENSOR)
    with pytest.raises(ValueError, match='a tensor has no storage'):
        load(TENSOR.replace(STORAGE, REPEATED).replace(b'K\x04\x85K\x01', b'K\x02\x85K\x01'))
    np.testing.assert_array_equal(load(TENSOR.replace(b'K\x04\x85', b'K\x03\x85')), np.zeros(3))


def legacy_file(path, value, keys=('0',), data=bytes(16)):
    parts = pickle.dumps(1001, 2), pickle.dumps({'little_endian': True}, 2), value + b'.'
    elements = struct.pack('<q', len(data) // 4)
    path.write_bytes(LEGACY_MAGIC + b''.join(parts) + pickle.dumps(list(keys), 2) + elements + data)
    return path


def test_legacy_weights_are_never_memory_that_nobody_wrote(tmp_path):
    legacy = TENSOR.replace(b'K\x04tQK\x01', b'K\x04NtQK\x00')
    assert load_pth(legacy_file(tmp_path / 'a.pth', legacy)).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match='its list of storages is not that of its tensors'):
        load_pth(legacy_file(tmp_path / 'a.pth', legacy, keys=()))


def overlapping_zip(path, _):
    """500 records, each of them the same megabyte."""
    with zipfile.ZipFile(zip_of(path, b'N.', bytes(2**20)), 'a') as archive:
        loads = b'('
        for key in map(str, range(100, 600)):
            archive.filelist.append(copy.copy(archive.getinfo('archive/data/0')))
            archive.filelist[-1].filename = f'archive/data/{key}'
            loads += STORAGE.replace(b'\x01\x00\x00\x000', b'\x03\x00\x00\x00' + key.encode())
        archive.writestr('b/data.pkl', loads + b't.')
    return path


def compressed_zip(path, _):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', STORAGE + b'.')
        archive.writestr('archive/data/0', bytes(2**24))
    return path


TEXT = pickle.BINUNICODE + struct.pack('<I', 10_000) + b'x' * 10_000
ENCODE = b'c_codecs\nencode\nq\x01' + TEXT + b'X\x06\x00\x00\x00latin1\x86q\x02'
PAIRS = b'](' + b''.join(b'M' + struct.pack('<H', i) + b'N\x86' for i in range(2000)) + b'e'
ORDERED = b'ccollections\nOrderedDict\nq\x01' + PAIRS + b'\x85q\x02'


@pytest.mark.parametrize(
    ('write', 'content', 'message'),
    [
        (zip_of, EXPANDED + b'.', 'more elements than its storage'),
        (zip_of, b'Nr\x00\x00\x00\x10.', None),  # a memo of 2 GB
        (zip_of, b'B\xff\xff\xff\xff', 'damaged'),
        (zip_of, b'\x96\x00\x00\x00\x10' + bytes(4), 'damaged'),
        (zip_of, b'(' + ENCODE + b'h\x01h\x02R' * 5000 + b't.', 'copies its data over and'),
        (zip_of, b'(' + ORDERED + b'h\x01h\x02R' * 1000 + b't.', None),
        (legacy_file, STORAGE.replace(b'K\x04tQ', b'J\x00\x00\x00\x10NtQ'), 'larger than the'),
        (overlapping_zip, None, 'compressed or larger than the file'),
        (compressed_zip, None, 'compressed or larger than the file'),
    ],
)
def test_no_file_takes_more_than_a_small_multiple_of_its_size(tmp_path, write, content, message):
    path = write(tmp_path / 'a.pth', content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            load_pth(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * path.stat().st_size + 2**20


def test_arrays_of_a_pickle_hold_what_it_holds_once():
    data = pickle.BINBYTES + struct.pack('<I', 10_000) + bytes(10_000)
    state = b"(K\x01M\x10'\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89" + data + b'tq\x02'
    array = b'cnumpy.core.multiarray\n_reconstruct\nq\x01)R' + state + b'b'
    assert load_arrays(io.BytesIO(array + b'.')).tolist() == [0] * 10_000
    for hostile, message in (
        (b'(' + array + b'h\x01)Rh\x02b' * 1000 + b't.', 'copies its data over and over'),
        (array.replace(data, b"M\x10'") + b'.', 'not a sound pickle'),  # a number of bytes
        (b"cnumpy\nndarray\nM\x10'\x85R.", 'not a sound pickle'),  # a shape alone
    ):
        with pytest.raises(ValueError, match=message):
            load_arrays(io.BytesIO(hostile))


@pytest.mark.parametrize('name', ['_codecs\nencode', 'torch\nFloatStorage'])
def test_a_file_cannot_change_what_the_next_one_is_read_with(tmp_path, name):
    state = b'N}X\x08\x00\x00\x00__name__X\x04\x00\x00\x00evils\x86'
    with pytest.raises(ValueError, match='sets attributes of a '):
        load_pth(zip_of(tmp_path / 'a.pth', b'c' + name.encode() + b'\n' + state + b'b.'))


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        (b'', b'Q.'),
        (b'}', b'Ns.'),
        (b'(', b'Nd.'),
        (b'ccollections\nOrderedDict\n](', b'N\x86e\x85R.'),
        (b'c_codecs\nencode\nN', b'\x86R.'),
    ],
)
def test_nested_containers_are_neither_printed_nor_hashed(tmp_path, before, after):
    """Each of 7 tuples holds the one before ten times: 10^7 leaves, for a start."""
    tuples = b''.join(b'(' + b'h%c' % i * 10 + b'tq%c0' % (i + 1) for i in range(7))
    path = zip_of(tmp_path / 'a.pth', b'Nq\x000' + tuples + before + b'h\x07' + after)
    with pytest.raises(ValueError, match=r'a\.pth: the file') as error:
        load_pth(path)
    assert len(str(error.value)) < 200 + len(str(path))


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


def test_safetensors_of_float8_are_refused_in_one_line(tmp_path):
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}'
    (tmp_path / 'a.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + bytes(2))
    with pytest.raises(ValueError, match=r'a\.safetensors holds float8_e4m3fn, which is not read'):
        read_checkpoint(tmp_path / 'a.safetensors')
