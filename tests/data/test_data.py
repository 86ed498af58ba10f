"""Sources and splits: hand-computed cases, refusals."""

import gzip
import os
import pickle
import re
import struct
import warnings
import zipfile

import jax
import ml_collections
import numpy as np
import pytest

from robustprune_jax import data
from robustprune_jax.data import idx

FASHION_MNIST = '/usr/share/datasets/fashion-mnist'


def config(**fields):
    defaults = {
        'name': 'digits',
        'dir': '',
        'num_classes': 10,
        'train_examples': 0,
        'validation': 0,
        'augment': 'none',
        'image_size': 8,
        'corrupt': 'stop',
        'pseudo_labelled': '',
    }
    return ml_collections.ConfigDict({**defaults, **fields})


def images_like(labels, height=3, width=2):
    """Images whose pixels all equal the example's index."""
    column = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(column, (len(labels), height, width, 1)).copy()


def idx_bytes(array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}I', *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """Six training and four test images of 3x2 pixels; training files gzipped, test files plain."""
    train, test = np.arange(6) % 3, np.arange(4) % 3
    for name, array in [
        ('train-images-idx3-ubyte.gz', images_like(train)[..., 0]),
        ('train-labels-idx1-ubyte.gz', train),
        ('t10k-images-idx3-ubyte', images_like(test)[..., 0]),
        ('t10k-labels-idx1-ubyte', test),
    ]:
        content = idx_bytes(array)
        packed = gzip.compress(content) if name.endswith('.gz') else content
        (tmp_path / name).write_bytes(packed)
    return tmp_path


@pytest.fixture
def npz_arrays():
    labels = np.arange(9) % 3
    images = images_like(labels)
    return {
        'train_images': images[:6],
        'train_labels': labels[:6],
        'test_images': images[6:],
        'test_labels': labels[6:],
    }


def save_npz(folder, arrays):
    path = folder / 'mine.npz'
    np.savez(path, **arrays)
    return config(name='npz', dir=str(path), num_classes=3)


def test_stratified_takes_evenly_from_every_class():
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    # In class order: 0 2 4 6 | 1 3 5 7; the middles of four equal parts are places 1, 3, 5, 7.
    np.testing.assert_array_equal(data.sources.stratified(labels, 4), [2, 3, 6, 7])
    assert len(data.sources.stratified(labels, 0)) == 0


def test_digits_are_split_by_class_without_overlap():
    train, validation, test, _ = data.load(config(validation=200))
    assert [len(split.labels) for split in (train, validation, test)] == [1237, 200, 360]
    total = sum(np.bincount(split.labels, minlength=10) for split in (train, validation, test))
    for split in (train, validation, test):
        assert split.images.dtype == np.uint8 and split.images.shape[1:] == (28, 28, 1)
        assert split.labels.dtype == np.int32
        share = total * len(split.labels) / 1797
        assert np.abs(np.bincount(split.labels, minlength=10) - share).max() < 2
    seen = [image.tobytes() for split in (train, validation, test) for image in split.images]
    assert len(set(seen)) == 1797  # all 8x8 originals differ, so no image is in two splits


def test_digits_fill_the_range_and_keep_the_picture():
    from sklearn.datasets import load_digits

    train = data.load(config()).train
    assert train.images.min() == 0 and train.images.max() == 255
    test = data.sources.stratified(load_digits().target, 360)
    originals = np.delete(load_digits().images, test, axis=0)
    corner = train.images[0, ::27, ::27, 0] / 255
    np.testing.assert_allclose(corner, originals[0][::7, ::7] / 16, atol=0.05)


def test_splits_do_not_depend_on_anything_but_the_data_set():
    first, again = data.load(config(validation=100)), data.load(config(validation=100))
    np.testing.assert_array_equal(first.validation.images, again.validation.images)


def test_train_examples_come_first_and_validation_is_cut_from_them(idx_folder):
    section = config(name='idx', dir=str(idx_folder), num_classes=3, train_examples=5, validation=2)
    train, validation, test, _ = data.load(section)
    # Labels 0 1 2 0 1, class order 0 3 1 4 2, middles of two halves: places 1 and 3.
    assert validation.images[:, 0, 0, 0].tolist() == [3, 4]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert train.labels.tolist() == [0, 1, 2] and len(test.labels) == 4


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'name': 'digit'}, "unknown data set 'digit': did you mean 'digits'"),
        ({'validation': 1437}, r'validation=1437 must be .* there are 1437'),
        ({'validation': -1}, r'validation=-1 must'),
        ({'train_examples': 1438}, r'train_examples=1438 must be between 0 \(all\) and the 1437'),
        ({'num_classes': 9}, r'train split of digits data: label 9 at index \d+ is outside 0\.\.8'),
    ],
)
def test_configs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data.load(config(**fields))


def test_idx_folder(idx_folder):
    train, validation, test, _ = data.load(config(name='idx', dir=str(idx_folder), num_classes=3))
    assert train.images.shape == (6, 3, 2, 1) and train.images.dtype == np.uint8
    assert train.images[:, 2, 1, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2] and train.labels.dtype == np.int32
    assert validation.images.shape == (0, 3, 2, 1) and test.labels.tolist() == [0, 1, 2, 0]


def test_idx_folder_or_files_missing(tmp_path, idx_folder):
    with pytest.raises(FileNotFoundError, match=r"dataset.dir='' is not a folder; it must hold"):
        data.load(config(name='idx'))
    (idx_folder / 't10k-labels-idx1-ubyte').unlink()
    (idx_folder / 'train-images-idx3-ubyte.gz').unlink()
    with pytest.raises(FileNotFoundError, match='train-images-idx3-ubyte, t10k-labels-idx1-ubyte'):
        data.load(config(name='idx', dir=str(idx_folder)))


IMAGES = idx_bytes(np.zeros((4, 3, 2)))  # 16 bytes of header, 24 of pixels


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (IMAGES[:-5], r'truncated: 35 bytes, its header says 40 for shape \(4, 3, 2\)'),
        (IMAGES[:9], 'truncated: 9 bytes, the header alone has 16'),
        (IMAGES[:2], 'truncated: 2 bytes'),
        (IMAGES + b'x', 'too long: 41 bytes, its header says 40'),
        (idx_bytes(np.zeros(4)), r'magic number 0x00000801, must be 0x00000803 \(unsigned bytes'),
        (idx_bytes(np.zeros((3, 3, 2))), '3 images but 4 labels'),
        (idx_bytes(np.zeros((4, 3, 0))), r'images are uint8 \(4, 3, 0, 1\), must be'),
        (idx_bytes(np.zeros((4, 2, 2))), r'training images are \(3, 2, 1\), test images \(2, 2,'),
    ],
)
def test_bad_idx_images_are_refused(idx_folder, content, message):
    (idx_folder / 't10k-images-idx3-ubyte').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(config(name='idx', dir=str(idx_folder), num_classes=3))


def test_truncated_and_broken_gzip(tmp_path):
    path = tmp_path / 'images.gz'
    noise = np.random.default_rng(0).integers(0, 256, (4, 30, 30))
    path.write_bytes(gzip.compress(idx_bytes(noise))[:-1000])
    with pytest.raises(ValueError, match=r'truncated: \d+ bytes, its header says 3616'):
        idx.read(path, ndim=3)
    path.write_bytes(b'not gzip at all')
    with pytest.raises(ValueError, match='not a sound gzip file'):
        idx.read(path, ndim=3)


def test_labels_out_of_range(idx_folder):
    with pytest.raises(ValueError, match=r'label 2 at index 2 is outside 0\.\.1 .*num_classes=2'):
        data.load(config(name='idx', dir=str(idx_folder), num_classes=2))


@pytest.mark.skipif(not os.path.isdir(FASHION_MNIST), reason='Fashion-MNIST is not installed')
def test_fashion_mnist():
    train, validation, test, _ = data.load(config(name='idx', dir=FASHION_MNIST, validation=1000))
    assert train.images.shape == (59000, 28, 28, 1) and test.images.shape == (10000, 28, 28, 1)
    assert np.bincount(validation.labels).tolist() == [100] * 10
    assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]


def test_npz(tmp_path, npz_arrays):
    train, _, test, _ = data.load(save_npz(tmp_path, npz_arrays))
    assert train.images.shape == (6, 3, 2, 1) and train.labels.dtype == np.int32
    assert test.images[:, 0, 0, 0].tolist() == [6, 7, 8]
    npz_arrays['train_images'] = npz_arrays['train_images'][..., 0]  # [N, H, W] is one channel
    np.testing.assert_array_equal(
        data.load(save_npz(tmp_path, npz_arrays)).train.images, train.images
    )


@pytest.mark.parametrize(
    ('key', 'change', 'message'),
    [
        ('test_labels', None, 'no test_labels in it; it has train_images, train_labels, test_im'),
        ('train_images', lambda a: a / 255, r'train split .* images are float64 .*\* 255'),
        ('train_images', lambda a: a.astype(np.int64), 'images are int64 .*, must be uint8'),
        ('test_images', lambda a: a[0, ..., 0], r'images are uint8 \(3, 2\), must be .*\[N, H'),
        ('test_images', lambda a: a[:, :0, :0], r'\(3, 0, 0, 1\), must be .*C at least 1'),
        ('test_images', lambda a: a[..., :0], r'\(3, 3, 2, 0\), must be .*C at least 1'),
        ('test_labels', lambda a: a / 1, r'labels are float64 \(3,\), must be integers'),
        ('test_labels', lambda a: a[:, None], r'labels are int64 \(3, 1\), must be integers'),
        ('test_labels', lambda a: a.astype(str), r'labels are <U\d+ \(3,\), must be integers'),
        ('test_labels', lambda a: a > 0, r'labels are bool \(3,\), must be integers'),
        (
            'test_labels',
            lambda a: a.astype('m8[s]'),
            r'labels are timedelta64\[s\] \(3,\), must be',
        ),
        ('test_labels', lambda a: a - 1, r'test split of npz data in .*: label -1 at index 0'),
        ('test_labels', lambda a: a[:-1], '3 images but 2 labels'),
        ('test_labels', lambda a: a.astype(object), 'Object arrays cannot be loaded'),
    ],
)
def test_bad_npz_is_refused(tmp_path, npz_arrays, key, change, message):
    array = npz_arrays.pop(key)
    if change:
        npz_arrays[key] = change(array)
    with pytest.raises(ValueError, match=message):
        data.load(save_npz(tmp_path, npz_arrays))


def npy(header):
    """An array of bytes with any text as its header."""
    text = header.encode().ljust(117) + b'\n'
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + bytes(36)


@pytest.mark.parametrize(
    'member',
    [
        b'',
        b'no array',
        npy("{'descr': '|u1'"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 3, 2, 1)}"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999,)}"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 3, 2, 100000000000)}"),
        npy('{[]: 1}'),
        npy("{1: 2, 'a': 3}"),
    ],
)
def test_a_broken_array_in_an_npz_file_ends_in_one_line(tmp_path, npz_arrays, member):
    del npz_arrays['train_images']
    section = save_npz(tmp_path, npz_arrays)
    with zipfile.ZipFile(section.dir, 'a') as file:
        file.writestr('train_images.npy', member)
    with pytest.raises(ValueError, match=r'mine\.npz: .*\Z'):
        data.load(section)


@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    [(8, 1, 'is encrypted'), (10, 9, 'compression method is not supported')],
)
def test_an_npz_file_that_is_packed_oddly_ends_in_one_line(
    tmp_path, npz_arrays, place, value, message
):
    section = save_npz(tmp_path, npz_arrays)
    path = tmp_path / 'mine.npz'
    content = bytearray(path.read_bytes())
    for entry in re.finditer(rb'PK\x01\x02', bytes(content)):  # of the directory at the end
        content[entry.start() + place] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'mine\.npz: .*{message}'):
        data.load(section)


def test_an_npz_file_with_flipped_bytes_ends_in_one_line(tmp_path, npz_arrays):
    section = save_npz(tmp_path, npz_arrays)
    for packing in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(section.dir, 'w', packing) as file:
            for key, array in npz_arrays.items():
                with file.open(f'{key}.npy', 'w') as member:
                    np.save(member, array)
        content = bytearray((tmp_path / 'mine.npz').read_bytes())
        content[60:100] = bytes(byte ^ 0x5A for byte in content[60:100])
        (tmp_path / 'mine.npz').write_bytes(content)
        with pytest.raises(ValueError, match=r'mine\.npz: '):
            data.load(section)


def test_classes_without_images_are_named(tmp_path, npz_arrays, monkeypatch):
    section = save_npz(tmp_path, npz_arrays)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data.load(section)
    section.num_classes, section.train_examples = 5, 2
    message = r'num_classes=5: train has none of 3 classes: 2, 3, 4; test .* 2 classes: 3, 4$'
    with pytest.warns(UserWarning, match=message) as caught:
        data.load(section)
    assert len(caught) == 1
    monkeypatch.setattr(jax, 'process_index', lambda: 1)  # of several, the first one tells
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data.load(section)


def test_empty_split(tmp_path, npz_arrays):
    empty = {key: npz_arrays[key][:0] for key in ('test_images', 'test_labels')}
    with pytest.raises(ValueError, match=r'test split of npz data in .*: no images'):
        data.load(save_npz(tmp_path, npz_arrays | empty))


def test_npz_that_is_not_one(tmp_path):
    path = tmp_path / 'mine.npz'
    for name in ('', str(tmp_path), str(path)):
        with pytest.raises(FileNotFoundError, match=r'must be the path of a whole \.npz file'):
            data.load(config(name='npz', dir=name))
    path.write_text('hello')
    with pytest.raises(FileNotFoundError, match=r'must be the path of a whole \.npz file'):
        data.load(config(name='npz', dir=str(path)))


@pytest.mark.parametrize('form', ['pickle', 'npz', 'generated'])
def test_files_of_pseudo_labelled_images(tmp_path, npz_arrays, form):
    images, labels = images_like(np.arange(4)), np.arange(4) % 3
    path = tmp_path / 'ti.pickle'
    if form == 'pickle':
        path.write_bytes(pickle.dumps({'data': images, 'extrapolated_targets': labels.tolist()}, 2))
    else:
        names = ('data', 'extrapolated_targets') if form == 'npz' else ('image', 'label')
        with path.open('wb') as file:
            np.savez(file, **dict(zip(names, (images, labels), strict=True)))
    section = save_npz(tmp_path, npz_arrays)
    assert data.load(section).pseudo is None
    section.pseudo_labelled = str(path)
    pseudo = data.load(section).pseudo
    np.testing.assert_array_equal(pseudo.images, images)
    np.testing.assert_array_equal(pseudo.labels, labels)
    assert pseudo.labels.dtype == np.int32


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (print, r'asks for (__builtin__|builtins)\.print, which is refused; nothing ran'),
        ([1], 'holds a list, must hold a dict'),
        ({'data': 1}, 'no data and extrapolated_targets in it; it has data'),
        ({1: 2}, 'no data and extrapolated_targets in it; it has 1'),
        ({'data': np.ones((2, 3)), 'extrapolated_targets': [0, 1]}, r'are float64 \(2, 3\), must'),
        (
            {'data': np.ones((2, 3, 2, 1), np.uint8), 'extrapolated_targets': [0.5, 1]},
            r'labels are float64 \(2,\), must be integers',
        ),
        (
            {'data': np.ones((2, 3, 2, 1), np.uint8), 'extrapolated_targets': [0, 3]},
            r'pseudo-labelled images in .*: label 3 at index 1 is outside 0\.\.2',
        ),
        (
            {'data': np.ones((2, 3, 3, 1), np.uint8), 'extrapolated_targets': [0, 1]},
            r'are \(3, 3, 1\), must be \(3, 2, 1\)',
        ),
    ],
)
def test_bad_pseudo_labelled_images_are_refused(tmp_path, npz_arrays, content, message):
    section = save_npz(tmp_path, npz_arrays)
    section.pseudo_labelled = str(tmp_path / 'ti.pickle')
    with pytest.raises(FileNotFoundError, match=r"pseudo_labelled='.*ti\.pickle' is not a file"):
        data.load(section)
    (tmp_path / 'ti.pickle').write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=message):
        data.load(section)
