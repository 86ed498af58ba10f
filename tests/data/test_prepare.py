"""Public archives, made here in their real formats, become folders that plain TFDS reads."""

import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy.io import savemat

from robustprune_jax import data
from robustprune_jax.config import default
from robustprune_jax.data.download import download
from robustprune_jax.data.prepare import prepare
from robustprune_jax.runtime.array_pickle import load_arrays

NAMES = ['plane', 'car', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def random_images(count, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def section(name, data_dir, **fields):
    dataset = default().dataset
    dataset.update(name=name, dir=str(data_dir), validation=0, **fields)
    return dataset


def write_tar(path, files, mode='w:gz'):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def planes(images):
    """The rows of CIFAR's archives: all red values, all green, all blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar10_parts():
    """{file name: (images, labels)}: ten images in each of the five batches, eight in the test."""
    parts = {f'data_batch_{i}': random_images(10, seed=i) for i in range(1, 6)}
    parts['test_batch'] = random_images(8, seed=9)
    return {name: (images, np.arange(len(images)) % 10) for name, images in parts.items()}


def cifar10_binary(path):
    files = {'cifar-10-batches-bin/batches.meta.txt': '\n'.join([*NAMES, '', '']).encode()}
    for name, (images, labels) in cifar10_parts().items():
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        files[f'cifar-10-batches-bin/{name}.bin'] = rows.tobytes()
    return write_tar(path, files)


def cifar10_python(path, extra=None):
    files = {'batches.meta': {'num_cases_per_batch': 10, 'label_names': NAMES, 'num_vis': 3072}}
    for name, (images, labels) in cifar10_parts().items():
        files[name] = {
            'batch_label': name,
            'labels': labels.tolist(),
            'data': planes(images),
            'filenames': [f'{i}.png' for i in range(len(labels))],
        }
    files |= extra or {}
    return write_tar(
        path,
        {f'cifar-10-batches-py/{name}': pickle.dumps(v, protocol=2) for name, v in files.items()},
    )


def svhn_files(folder):
    """Three images each; the label 10 is the digit 0."""
    for part, count in (('train', 12), ('test', 5)):
        images = random_images(count, seed=count)
        labels = np.arange(count)[:, None] % 10 + 1
        savemat(
            folder / f'{part}_32x32.mat',
            {'X': images.transpose(1, 2, 3, 0), 'y': labels.astype(np.uint8)},
            do_compression=True,
        )
    return folder


READER = """
import json, sys
import tensorflow_datasets as tfds
name, data_dir, split, out = sys.argv[1:]
import numpy as np
source = tfds.data_source(name, data_dir=data_dir, split=split)
examples = sorted(source, key=lambda example: example['id'])
np.savez(out, image=[e['image'] for e in examples], label=[e['label'] for e in examples])
loaded = [m for m in sys.modules if m.split('.')[0] in ('robustprune_jax', 'tensorflow')]
print(json.dumps({'loaded': loaded, 'names': source.dataset_info.features['label'].names}))
"""


def read_elsewhere(tmp_path, name, split):
    """What tfds.data_source gives, in the archive's order, in a process without this project."""
    out = tmp_path / f'{split}.npz'
    result = subprocess.run(
        [sys.executable, '-c', READER, name, tmp_path, split, out],
        cwd='/', capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report['loaded'] == []
    return np.load(out), report['names']


# --- archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize('archive', [cifar10_binary, cifar10_python])
def test_cifar10_is_read_by_plain_tfds(tmp_path, archive):
    folder = prepare('cifar10', tmp_path, archive(tmp_path / 'archive.tar.gz'))
    assert folder == tmp_path / 'cifar10' / '3.0.2'
    *train, test = cifar10_parts().values()
    found, names = read_elsewhere(tmp_path, 'cifar10', 'train')
    np.testing.assert_array_equal(found['image'], np.concatenate([images for images, _ in train]))
    np.testing.assert_array_equal(found['label'], np.concatenate([labels for _, labels in train]))
    assert names == NAMES
    if archive is cifar10_python:
        return
    found, _ = read_elsewhere(tmp_path, 'cifar10', 'test')
    np.testing.assert_array_equal(found['image'], test[0])
    np.testing.assert_array_equal(found['label'], test[1])


def test_a_prepared_set_is_trained_on_by_name(tmp_path):
    prepare('cifar10', tmp_path, cifar10_binary(tmp_path / 'cifar-10-binary.tar.gz'))
    splits = data.load(section('cifar10', tmp_path, train_examples=40))
    assert splits.train.images.shape == (40, 32, 32, 3) and splits.test.images.shape[0] == 8
    images, labels = cifar10_parts()['test_batch']
    places = [np.flatnonzero((images == image).all((1, 2, 3)))[0] for image in splits.test.images]
    assert sorted(places) == list(range(8))
    np.testing.assert_array_equal(splits.test.labels, labels[places])


def test_svhn_is_read_by_plain_tfds(tmp_path):
    prepare('svhn_cropped', tmp_path, svhn_files(tmp_path))
    found, _ = read_elsewhere(tmp_path, 'svhn_cropped', 'train')
    np.testing.assert_array_equal(found['image'], random_images(12, seed=12))
    assert found['label'].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


@pytest.mark.parametrize('form', ['binary', 'python'])
def test_cifar100_has_both_kinds_of_labels(tmp_path, form):
    images, fine, coarse = random_images(6), np.arange(6) * 19, np.arange(6) * 3
    fine_names, coarse_names = ([f'{k}{i}' for i in range(n)] for k, n in (('f', 100), ('c', 20)))
    if form == 'binary':
        labels = np.stack([coarse, fine], axis=1).astype(np.uint8)
        rows = np.concatenate([labels, planes(images)], axis=1).tobytes()
        files = {'train.bin': rows, 'test.bin': rows[: 2 * 3074]}
        files['fine_label_names.txt'] = '\n'.join(fine_names).encode()
        files['coarse_label_names.txt'] = '\n'.join(coarse_names).encode()
    else:
        part = {'data': planes(images), 'fine_labels': fine, 'coarse_labels': coarse}
        meta = {'fine_label_names': fine_names, 'coarse_label_names': coarse_names}
        parts = {'train': part, 'test': part, 'meta': meta}
        files = {name: pickle.dumps(value, protocol=2) for name, value in parts.items()}
    prepare('cifar100', tmp_path, write_tar(tmp_path / 'cifar-100.tar.gz', files))
    train = data.load(section('cifar100', tmp_path, num_classes=100)).train
    order = np.argsort(train.labels)
    np.testing.assert_array_equal(train.images[order], images)
    np.testing.assert_array_equal(train.labels[order], fine)


def mnist_files(folder):
    for part, count in (('train', 7), ('t10k', 3)):
        images, labels = random_images(count, (28, 28)), np.arange(count, dtype=np.uint8)
        for name, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}I', *array.shape)
            (folder / f'{part}-{name}-ubyte.gz').write_bytes(
                gzip.compress(header + array.tobytes())
            )
    return folder


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_mnist_from_idx_files(tmp_path, name):
    prepare(name, tmp_path, mnist_files(tmp_path))
    train = data.load(section(name, tmp_path)).train
    order = np.argsort(train.labels)
    np.testing.assert_array_equal(train.images[order][..., 0], random_images(7, (28, 28)))


def test_a_prepared_folder_is_not_made_again(tmp_path):
    folder = prepare('mnist', tmp_path, mnist_files(tmp_path))
    before = (folder / 'dataset_info.json').stat().st_mtime_ns
    assert prepare('mnist', tmp_path, tmp_path / 'nowhere') == folder
    assert (folder / 'dataset_info.json').stat().st_mtime_ns == before


# --- what is wrong is said in one line --------------------------------------------------------


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


def flipped(path, packed):
    """The archive, packed otherwise, with some bytes in its middle flipped."""
    content = bytearray(packed(gzip.decompress(cifar10_binary(path).read_bytes())))
    middle = slice(len(content) // 2, len(content) // 2 + 200)
    content[middle] = bytes(byte ^ 0x5A for byte in content[middle])
    path.write_bytes(content)
    return path


def with_test_batch(path, content):
    return cifar10_python(path, {'test_batch': content})


class Evil:
    def __reduce__(self):
        return os.system, ('touch /tmp/robustprune_jax_was_here',)


PLANES = planes(random_images(2))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda d: d / 'none.tar.gz', r'none\.tar\.gz: there is no such file'),
        (lambda d: cut(cifar10_binary(d / 'a.tar.gz'), 9000), r'a\.tar\.gz: not a whole tar arch'),
        (lambda d: d, r'neither the binary archive \(missing data_batch_1\.bin'),
        (
            lambda d: write_tar(d / 'a.tar', {'data_batch_1.bin': b'x' * 3074}, 'w'),
            r'missing data_batch_2\.bin, data_batch_3\.bin, data_batch_4\.bin, \.\.\.',
        ),
        (
            lambda d: cifar10_python(d / 'a.tar.gz', {'test_batch': {'data': Evil()}}),
            r'a\.tar\.gz: test_batch: the file asks for posix\.system, which is refused; nothing',
        ),
        (
            lambda d: cifar10_python(
                d / 'a.tar.gz', {'test_batch': {'data': random_images(2), 'labels': [0, 10]}}
            ),
            r'a\.tar\.gz: test split: label 10 at index 1 is outside 0\.\.9',
        ),
        (lambda d: flipped(d / 'a.tar.xz', lzma.compress), r'a\.tar\.xz: not a whole tar archive'),
        (lambda d: flipped(d / 'a.tar.bz2', bz2.compress), r'a\.tar\.bz2: not a whole tar .*\)\Z'),
        (
            lambda d: with_test_batch(d / 'a.tar.gz', [1, 2]),
            r'a\.tar\.gz: test_batch is no dict with data and labels',
        ),
        (
            lambda d: with_test_batch(d / 'a.tar.gz', {'data': PLANES, 'labels': [0.5, 1]}),
            r'a\.tar\.gz: test split: labels are float64 \(2,\), must be integers',
        ),
        (
            lambda d: with_test_batch(d / 'a.tar.gz', {'data': PLANES, 'labels': ['0', '1']}),
            r'a\.tar\.gz: test split: labels are <U1 \(2,\), must be integers',
        ),
        (
            lambda d: with_test_batch(d / 'a.tar.gz', {'data': PLANES / 255, 'labels': [0, 1]}),
            r'a\.tar\.gz: test split: images are float64 .* must be uint8',
        ),
        (
            lambda d: with_test_batch(d / 'a.tar.gz', {'data': PLANES[:, :9], 'labels': [0, 1]}),
            r'a\.tar\.gz: cannot reshape array of size 18',
        ),
        (
            lambda d: cifar10_python(d / 'a.tar.gz', {'batches.meta': {'label_names': 5}}),
            r'a\.tar\.gz: the names of its classes are no list of text',
        ),
    ],
)  # fmt: skip
def test_archives_that_are_not_cifar10(tmp_path, make, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare('cifar10', tmp_path / 'out', make(tmp_path))
    assert not (tmp_path / 'out' / 'cifar10' / '3.0.2').exists()
    assert not os.path.exists('/tmp/robustprune_jax_was_here')


def test_svhn_files_that_are_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no .*train_32x32\.mat and no .*test_32x32\.mat'):
        prepare('svhn_cropped', tmp_path, tmp_path)
    cut(svhn_files(tmp_path) / 'test_32x32.mat', 5000)
    with pytest.raises(ValueError, match=r'test_32x32\.mat: not a whole SVHN file'):
        prepare('svhn_cropped', tmp_path, tmp_path)


def test_svhn_labels_are_1_to_10(tmp_path):
    svhn_files(tmp_path)
    images = random_images(2).transpose(1, 2, 3, 0)
    savemat(tmp_path / 'test_32x32.mat', {'X': images, 'y': np.array([[1], [11]], np.uint8)})
    with pytest.raises(ValueError, match=r'test split: label 11 at index 1 is outside 0\.\.9'):
        prepare('svhn_cropped', tmp_path / 'out', tmp_path)


def test_mnist_files_of_another_size(tmp_path):
    mnist_files(tmp_path)
    images = random_images(3, (20, 20))
    header = bytes((0, 0, 8, 3)) + struct.pack('>3I', *images.shape)
    path = tmp_path / 't10k-images-idx3-ubyte'
    path.write_bytes(header + images.tobytes())
    with pytest.raises(ValueError, match=r'images are \(20, 20, 1\), must be \(28, 28, 1\)'):
        prepare('mnist', tmp_path / 'out', tmp_path)


def prepared_elsewhere(tmp_path, pictures):
    """A folder of MNIST whose images are these, which no check of ours has seen."""
    builder = tfds.builder('mnist', data_dir=tmp_path, file_format='array_record')

    def examples():
        for i, picture in enumerate(pictures):
            file = io.BytesIO()
            picture.save(file, 'png')
            file.seek(0)
            yield i, {'image': file, 'label': i}

    builder._split_generators = lambda *_: {'train': examples(), 'test': examples()}
    builder.download_and_prepare()
    return section('mnist', tmp_path)


def test_records_are_read_as_8_bit_grey_whatever_png_they_are(tmp_path):
    grey = Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    coloured = Image.merge('RGB', [grey] * 3)
    dataset = prepared_elsewhere(tmp_path, [deep, grey.convert('P'), coloured])
    train = data.load(dataset).train
    assert np.abs(train.images[..., 0].astype(int) - np.asarray(grey)).max() <= 1


def test_a_record_of_another_size_is_named(tmp_path):
    dot = Image.fromarray(np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match=r'train record 0 is \(1, 1, 1\), must be \(28, 28, 1\)'):
        data.load(prepared_elsewhere(tmp_path, [dot]))


def test_a_folder_that_is_not_there_or_not_whole(tmp_path):
    make = f'python -m robustprune_jax.data.prepare cifar10 --data_dir={tmp_path}'
    with pytest.raises(FileNotFoundError, match=f'3.0.2 is not there; make it with: {make}'):
        data.load(section('cifar10', tmp_path))
    (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f'is not whole: remove it, and make it .*{make}'):
        data.load(section('cifar10', tmp_path))
    with pytest.raises(ValueError, match='is there, but not whole: remove it first'):
        prepare('cifar10', tmp_path, tmp_path)
    (tmp_path / 'cifar10' / '3.0.2').rmdir()
    folder = prepare('cifar10', tmp_path, cifar10_binary(tmp_path / 'a.tar.gz'))
    records = next(folder.glob('*-train.array_record*'))
    whole = records.read_bytes()
    for broken in (b'', whole[: len(whole) // 2]):
        records.write_bytes(broken)
        with pytest.raises(ValueError, match=r'3\.0\.2: train records cannot be read'):
            data.load(section('cifar10', tmp_path))
    next(folder.glob('*-test.array_record*')).unlink()
    with pytest.raises(ValueError, match=r'cifar10-test.* is missing: the folder is not whole'):
        data.load(section('cifar10', tmp_path))


def test_names_that_tfds_does_not_prepare_here(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar11': did you mean 'cifar10'"):
        data.load(section('cifar11', tmp_path))
    with pytest.raises(FileNotFoundError, match='with: tfds build imagenette/160px --data_dir='):
        data.load(section('imagenette/160px', tmp_path))


def test_pickles_of_arrays():
    content = {'data': random_images(2), 'f': np.asfortranarray(np.eye(2, 3)), 'n': np.int64(3)}
    for protocol in range(6):
        loaded = load_arrays(io.BytesIO(pickle.dumps(content, protocol)))
        assert all(np.array_equal(loaded[key], content[key]) for key in content)
    with pytest.raises(ValueError, match='not a sound pickle'):
        load_arrays(io.BytesIO(pickle.dumps(content)[:50]))
    with pytest.raises(ValueError, match="values of type 'O8', which is refused"):
        load_arrays(io.BytesIO(pickle.dumps(np.array([Evil()]))))


# --- downloads --------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A server on localhost: .files is what it has; .breaks, how often it hangs up halfway."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            self.server.starts.append(start)
            if start >= len(content):
                return self.send_error(416)
            rest = content[start:]
            self.send_response(206 if 'Range' in self.headers else 200)
            self.send_header('Content-Length', str(len(rest)))
            self.end_headers()
            self.server.breaks -= 1
            self.wfile.write(rest[: len(rest) // 2] if self.server.breaks >= 0 else rest)
            return None

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('localhost', 0), Handler) as server:
        server.files, server.breaks, server.starts = {}, 0, []
        server.url = f'http://localhost:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_download_then_prepare(tmp_path, server):
    content = cifar10_binary(tmp_path / 'a.tar.gz').read_bytes()
    server.files['/cifar-10-binary.tar.gz'] = content
    server.breaks = 2
    prepare('cifar10', tmp_path, urls={f'{server.url}/cifar-10-binary.tar.gz': sha256(content)})
    half = len(content) // 2
    assert server.starts == [0, half, half + (len(content) - half) // 2]
    assert (tmp_path / 'downloads/cifar10/cifar-10-binary.tar.gz').read_bytes() == content
    assert len(data.load(section('cifar10', tmp_path)).train.labels) == 50


def test_an_interrupted_download_goes_on_later(tmp_path, server):
    content, path = b'0123456789' * 1000, tmp_path / 'file'
    server.files['/file'], server.breaks = content, 5
    with pytest.raises(OSError, match=r'connection was closed \(\d+ bytes are in .*file\.part'):
        download(f'{server.url}/file', path, sha256(content))
    assert not path.exists()
    have = (tmp_path / 'file.part').stat().st_size
    download(f'{server.url}/file', path, sha256(content))
    assert path.read_bytes() == content and server.starts[-1] == have
    requests = len(server.starts)
    download(f'{server.url}/file', path, sha256(content))  # there already
    assert len(server.starts) == requests


def test_a_download_that_was_whole_but_not_yet_checked(tmp_path, server):
    server.files['/file'] = b'abc'
    (tmp_path / 'file.part').write_bytes(b'abc')
    download(f'{server.url}/file', tmp_path / 'file', sha256(b'abc'))
    assert (tmp_path / 'file').read_bytes() == b'abc'


def test_a_wrong_checksum_leaves_nothing(tmp_path, server):
    server.files['/file'] = b'abc'
    with pytest.raises(ValueError, match=f'{sha256(b"abc")}, must be {sha256(b"x")}; removed'):
        download(f'{server.url}/file', tmp_path / 'file', sha256(b'x'))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_or_no_server(tmp_path, server):
    with pytest.raises(OSError, match='/none: 404 Not Found'):
        download(f'{server.url}/none', tmp_path / 'file', sha256(b'x'))
    with pytest.raises(OSError, match=r'refused \(0 bytes are in'):
        download('http://localhost:9/file', tmp_path / 'file', sha256(b'x'))


LIMITED = """
import resource, sys
from robustprune_jax.data import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv[0] = 'prepare'
prepare.main()
"""


def test_a_full_disk_leaves_no_folder(tmp_path):
    archive = cifar10_binary(tmp_path / 'a.tar.gz')
    result = subprocess.run(
        [sys.executable, '-c', LIMITED, 'cifar10', f'--data_dir={tmp_path}', f'--from={archive}'],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'was not written' in last
    assert not list((tmp_path / 'cifar10').glob('*'))
    assert len(prepare('cifar10', tmp_path, archive).name) == 5
