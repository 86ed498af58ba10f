"""Sources, splits, batches and augmentation: hand-computed cases, refusals, exact resume."""

import gzip
import os
import pickle
import re
import struct
import warnings
import zipfile

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from robustprune_jax import data, pipeline
from robustprune_jax.data import augment, batches, idx
from robustprune_jax.runtime.files import read_jsonl

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


# --- splits -----------------------------------------------------------------------------------


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


# --- idx --------------------------------------------------------------------------------------


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


# --- npz --------------------------------------------------------------------------------------


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


# --- batches ----------------------------------------------------------------------------------


def indices(iterator, steps):
    return [next(iterator)['image'][:, 0, 0, 0].tolist() for _ in range(steps)]


def iterate(count=10, batch_size=4, seed=0, **kw):
    labels = np.arange(count)
    return batches.train_batches(
        images_like(labels), labels, batch_size=batch_size, seed=seed, **kw
    )


def test_every_epoch_has_every_example_once_in_a_new_order():
    flat = np.ravel(indices(iterate(), 10))  # four epochs of ten examples
    epochs = flat.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batches_have_their_labels_and_one_shape():
    iterator = iterate()
    for _ in range(6):
        batch = next(iterator)
        assert batch['image'].shape == (4, 3, 2, 1) and batch['image'].dtype == np.uint8
        assert batch['label'].dtype == np.int32
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


def test_order_depends_on_the_seed_alone():
    assert indices(iterate(seed=3), 5) == indices(iterate(seed=3), 5)
    assert indices(iterate(seed=3), 5) != indices(iterate(seed=4), 5)


def test_a_data_set_smaller_than_the_batch():
    assert sorted(indices(iterate(count=2), 1)[0]) == [0, 0, 1, 1]


def test_processes_share_the_global_batch():
    whole = indices(iterate(), 5)
    parts = [indices(iterate(process=(i, 2)), 5) for i in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match='batch_size=4 does not divide among 3 processes'):
        iterate(process=(0, 3))


def test_resume_from_state():
    iterator = iterate()
    indices(iterator, 3)
    state = iterator.get_state()
    expected = indices(iterator, 6)
    other = iterate()
    other.set_state(state)
    assert indices(other, 6) == expected


def test_resume_through_orbax(tmp_path):
    iterator = iterate()
    assert isinstance(iterator, grain.DatasetIterator)
    indices(iterator, 3)
    with ocp.training.Checkpointer(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save_checkpointables(3, {'data': iterator})
    expected = indices(iterator, 6)
    other = iterate()
    with ocp.training.Checkpointer(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.load_checkpointables(3, {'data': other})
    assert indices(other, 6) == expected


def mixed(steps, **kw):
    """Labels 0..9, and pseudo-labelled images of labels 100..106: three of a batch of eight."""
    labels = np.arange(7) + 100
    pseudo = images_like(labels) + 100, labels
    iterator = iterate(**{'batch_size': 8, 'pseudo': pseudo, 'pseudo_count': 3, **kw})
    return iterator, [next(iterator) for _ in range(steps)]


def test_pseudo_labelled_images_are_mixed_into_every_batch():
    _, seen = mixed(14)
    for batch in seen:
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
        # Evenly: places (i + 1/2) / 3 among (i + 1/2) / 5.
        assert (batch['label'] >= 100).tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    labels = np.stack([batch['label'] for batch in seen])
    # 14 batches: seven epochs of the ten, six of the seven; neither waits for the other.
    assert np.bincount(labels[labels < 100]).tolist() == [7] * 10
    assert np.bincount(labels[labels >= 100] - 100).tolist() == [6] * 7


def test_mixed_batches_resume_and_are_shared_by_processes():
    iterator, _ = mixed(3)
    state = iterator.get_state()
    expected = [next(iterator)['label'].tolist() for _ in range(4)]
    again, _ = mixed(0)
    again.set_state(state)
    assert [next(again)['label'].tolist() for _ in range(4)] == expected
    parts = [mixed(7, process=(i, 2))[1][3:] for i in range(2)]
    joined = [[*a['label'], *b['label']] for a, b in zip(*parts, strict=True)]
    assert joined == expected


def test_an_epoch_is_once_through_the_labelled_images(tiny_config, tmp_path):
    config = tiny_config()
    path = tmp_path / 'generated.npz'
    np.savez(path, image=np.zeros((5, 12, 12, 1), np.uint8), label=np.arange(5) % 3)
    config.dataset.update(pseudo_labelled=str(path), pseudo_ratio=0.25)
    config.update(objective='natural', phases='pretrain')
    config.pretrain.epochs = 2
    pipeline.run(config, tmp_path / 'run')
    lines = read_jsonl(tmp_path / 'run' / 'pretrain' / 'metrics.jsonl')
    # 96 images (16 of 112 held out), 24 of a batch of 32: four steps, three would be all of it.
    assert [line['step'] for line in lines] == [4, 8]


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


def test_evaluation_sees_every_example_once_and_marks_the_padding():
    labels = np.arange(10)
    seen = list(batches.eval_batches(images_like(labels), labels, 4))
    assert [batch['mask'].tolist() for batch in seen] == [
        [True] * 4,
        [True] * 4,
        [True] * 2 + [False] * 2,
    ]
    for batch in seen:
        assert batch['image'].shape == (4, 3, 2, 1) and batch['image'].dtype == np.uint8
        assert batch['label'].shape == (4,) and batch['label'].dtype == np.int32
    kept = np.concatenate([batch['label'][batch['mask']] for batch in seen])
    np.testing.assert_array_equal(kept, labels)
    assert seen[-1]['image'][:, 0, 0, 0].tolist() == [8, 9, 0, 0]


# --- augmentation -----------------------------------------------------------------------------


def test_to_float():
    scaled = augment.to_float(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(scaled, [0, 0.2, 1], rtol=1e-6)
    assert scaled.max() == 1 and scaled.dtype == jnp.float32


def test_crop_at_by_hand():
    image = jnp.arange(1.0, 5).reshape(1, 2, 2, 1)  # 1 2 / 3 4
    images = jnp.tile(image, (4, 1, 1, 1))
    windows = augment.crop_at(images, jnp.array([[4, 4], [5, 4], [4, 3], [0, 0]]))
    np.testing.assert_array_equal(
        windows[..., 0], [[[1, 2], [3, 4]], [[3, 4], [0, 0]], [[0, 1], [0, 3]], [[0, 0], [0, 0]]]
    )


def test_crop_draws_all_offsets():
    # One bright pixel in the middle of 9x9 ends up in each of the 81 places.
    images = jnp.zeros((4000, 9, 9, 1)).at[:, 4, 4].set(1)
    moved = augment.crop(jax.random.key(0), images)
    counts = np.asarray(moved.sum(0))[..., 0]
    assert counts.sum() == 4000 and counts.min() > 20 and counts.max() < 90


def test_crop_flip_mirrors_half_of_the_crops():
    images = jax.random.uniform(jax.random.key(1), (200, 6, 5, 3))
    key = jax.random.key(0)
    result = augment.crop_flip(key, images)
    crops = augment.crop(jax.random.split(key)[0], images)
    same = jnp.all(result == crops, axis=(1, 2, 3))
    mirrored = jnp.all(result == crops[:, :, ::-1], axis=(1, 2, 3))
    assert bool(jnp.all(same | mirrored)) and 70 < int(mirrored.sum()) < 130


def test_none_changes_nothing():
    images = jnp.ones((2, 3, 3, 1))
    assert augment.AUGMENTATIONS['none'](jax.random.key(0), images) is images


@pytest.mark.parametrize('name', augment.AUGMENTATIONS)
def test_augmentation_is_the_same_on_any_number_of_devices(name):
    images = jax.random.uniform(jax.random.key(1), (8, 6, 5, 3))
    expected = augment.AUGMENTATIONS[name](jax.random.key(0), images)
    count = next(n for n in (4, 2, 1) if n <= jax.device_count())
    mesh = jax.make_mesh(
        (count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    sharded = jax.jit(augment.AUGMENTATIONS[name])(
        jax.random.key(0), jax.device_put(images, sharding)
    )
    np.testing.assert_array_equal(sharded, expected)
