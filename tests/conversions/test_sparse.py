"""Files without their zeros."""

import numpy as np
import pytest
import safetensors.numpy

from conversion.files import read_checkpoint, write_checkpoint
from conversion.sparse import packed


def tensors():
    rng = np.random.default_rng(0)
    found = {}
    for density in (0, 0.002, 0.01, 0.1, 0.5):
        mask = rng.random((7, 30, 11)) < density
        found[f'{density}'] = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    found['last'] = np.zeros(1000, np.float32)
    found['last'][999] = 1  # 254 + 3 * 255 zeros before it and more
    found['first'] = found['last'][::-1].copy()
    found['bias'] = np.ones(5, np.float32)
    found['count'] = np.zeros(100, np.int64)
    return found


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    written = tensors()
    write_checkpoint(tmp_path / 'a.safetensors', written, {'arch': 'x'}, sparse='float32')
    read, fields = read_checkpoint(tmp_path / 'a.safetensors')
    assert fields['arch'] == 'x'
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor, name)
    # five bytes a weight, and one for 255 zeros
    size, count = written['0.01'].nbytes, np.count_nonzero(written['0.01'])
    small, shapes = packed({'0.01': written['0.01']})
    assert sum(a.nbytes for a in small.values()) <= 5 * count + size / 4 / 255
    assert shapes == {'0.01': [7, 30, 11]}


def test_gaps_by_hand():
    tensor = np.zeros((2, 300), np.float32)
    tensor[0, 2], tensor[0, 3], tensor[1, 250] = 1, 2, 3  # 2, 0, 255 + 255 + 36 zeros; then 49
    found, _ = packed({'a': tensor})
    assert found['a.gaps'].tolist() == [2, 0, 255, 255, 36]
    assert found['a.values'].tolist() == [1, 2, 3]


def test_half_precision_rounds_and_refuses_what_it_cannot_hold(tmp_path):
    written = tensors()
    write_checkpoint(tmp_path / 'a.safetensors', written, {}, sparse='float16')
    read, _ = read_checkpoint(tmp_path / 'a.safetensors')
    np.testing.assert_array_equal(read['0.1'], written['0.1'].astype(np.float16))
    assert read['0.1'].dtype == np.float32
    with pytest.raises(ValueError, match='last has values that float16 cannot hold'):
        packed({'last': written['last'] * 1e5}, 'float16')
    with pytest.raises(ValueError, match=r'a\.pth: a file without its zeros is a \.safetensors'):
        write_checkpoint(tmp_path / 'a.pth', written, {}, sparse='float32')


@pytest.mark.parametrize(
    ('gaps', 'values', 'shapes'),
    [
        ([2, 0], [1.0], '{"a": [2, 300]}'),
        ([2], [1.0], '{"a": [1000000000000]}'),
        ([2, 255], [1.0], '{"a": [2]}'),
        ([2], [1.0], '{"b": [3]}'),
        ([2], [1.0], '{"a": 3}'),
        ([2], [1.0], '['),
    ],
)
def test_damaged_files_end_in_one_line(tmp_path, gaps, values, shapes):
    arrays = {'a.gaps': np.array(gaps, np.uint8), 'a.values': np.array(values, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / 'a.safetensors', {'sparse': shapes})
    with pytest.raises(ValueError, match=r'a\.safetensors is a damaged sparse file'):
        read_checkpoint(tmp_path / 'a.safetensors')
