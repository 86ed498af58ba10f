"""The public archives of small images, as their authors publish them."""

import io
import lzma
import tarfile
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from robustprune_jax.data import idx
from robustprune_jax.runtime.array_pickle import load_arrays


class Archive(NamedTuple):
    """{split: {'image': uint8 [N, H, W, C], 'label': [N], ...}} and {'label': its classes, ...}.

    As the files say: prepare checks them.
    """

    splits: dict[str, dict[str, np.ndarray]]
    names: dict[str, list[str]]


def cifar10(path: Path) -> Archive:
    """Returns CIFAR-10 from its binary or Python archive, or a folder with it, packed or not."""
    parts = {'train': [f'data_batch_{i}' for i in range(1, 6)], 'test': ['test_batch']}
    return _cifar(path, parts, {'label': 'labels'}, {'label': 'label_names'}, 'batches.meta')


def cifar100(path: Path) -> Archive:
    """Returns CIFAR-100, as cifar10 does."""
    parts = {'train': ['train'], 'test': ['test']}
    labels = {'coarse_label': 'coarse_labels', 'label': 'fine_labels'}
    names = {'coarse_label': 'coarse_label_names', 'label': 'fine_label_names'}
    return _cifar(path, parts, labels, names, 'meta')


def _cifar(path, parts, labels, names, meta) -> Archive:
    """labels, names: what the Python archive calls a TFDS feature and its classes, in the order of
    the bytes of a binary record.
    """
    binary = {f'{file}.bin' for files in parts.values() for file in files}
    python = {meta, *(file for files in parts.values() for file in files)}
    # The binary archives call the files of classes batches.meta.txt, fine_label_names.txt, ...
    texts = {key: 'batches.meta.txt' if meta == 'batches.meta' else f'{names[key]}.txt'
             for key in names}  # fmt: skip
    content = _members(path, binary | python | set(texts.values()))
    try:
        if binary <= content.keys():
            splits = {
                split: _binary_records([(f, content[f'{f}.bin']) for f in files], list(labels))
                for split, files in parts.items()
            }
            texts = {key: content[file] for key, file in texts.items() if file in content}
            return Archive(splits, {key: text.decode().split() for key, text in texts.items()})
        if python <= content.keys():
            keys = {file: ['data', *labels.values()] for file in python} | {meta: names.values()}
            loaded = {file: _pickled(file, content[file], keys[file]) for file in python}
            splits = {
                split: _python_records([loaded[file] for file in files], labels)
                for split, files in parts.items()
            }
            return Archive(splits, {key: loaded[meta][name] for key, name in names.items()})
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    raise ValueError(
        f'{path}: neither the binary archive (missing {_some(binary - content.keys())}) nor the '
        f'Python one (missing {_some(python - content.keys())})'
    )


def _binary_records(files, labels) -> dict[str, np.ndarray]:
    size = len(labels) + 3072
    for name, data in files:
        if not data or len(data) % size:
            raise ValueError(f'{name}.bin has {len(data)} bytes, no multiple of {size}')
    rows = np.concatenate([np.frombuffer(data, np.uint8) for _, data in files]).reshape(-1, size)
    images = rows[:, len(labels) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {'image': images, **{key: rows[:, i] for i, key in enumerate(labels)}}


def _python_records(files, labels) -> dict[str, np.ndarray]:
    images = np.concatenate([np.asarray(file['data']) for file in files])
    columns = {key: np.concatenate([file[name] for file in files]) for key, name in labels.items()}
    return {'image': images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), **columns}


def _pickled(name, data: bytes, keys) -> dict:
    try:
        content = load_arrays(io.BytesIO(data))
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise ValueError(f'{name} is no dict with {" and ".join(keys)}')
    return content


def _members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Returns the wanted files, by their name without folders, in a tar archive or below a folder.

    A folder with neither is searched for tar archives.
    """
    if path.is_dir():
        found = {file.name: file.read_bytes() for file in path.rglob('*') if file.name in wanted
                 and file.is_file()}  # fmt: skip
        archives = [] if found else sorted([*path.glob('*.tar'), *path.glob('*.tar.gz')])
        return _members(archives[0], wanted) if archives else found
    if not path.exists():
        raise FileNotFoundError(f'{path}: there is no such file or folder')
    return dict(tar_members(path, wanted))


def tar_members(
    path: Path, wanted: Container[str] | None = None, data: bytes | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yields the name, without folders, and content of each wanted file in a tar archive.

    wanted: names; all if None. data: the archive, where it lies in another. Raises ValueError with
    `path` for an archive that is not whole.
    """
    try:
        with tarfile.open(path, fileobj=None if data is None else io.BytesIO(data)) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and (wanted is None or name in wanted):
                    yield name, tar.extractfile(member).read()
            tar.fileobj.seek(tar.offset)  # of the first block that is no member
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes noise for its end
                raise tarfile.ReadError(f'noise at byte {tar.offset}')
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'{path}: not a whole tar archive ({reason})') from error


def svhn_cropped(path: Path) -> Archive:
    """Returns SVHN from a folder of train_32x32.mat, test_32x32.mat and, if it is there,
    extra_32x32.mat.
    """
    files = {split: path / f'{split}_32x32.mat' for split in ('train', 'test', 'extra')}
    missing = [str(files[split]) for split in ('train', 'test') if not files[split].is_file()]
    if missing:
        raise FileNotFoundError(f'svhn_cropped: no {" and no ".join(missing)}')
    return Archive({split: _mat(file) for split, file in files.items() if file.is_file()}, {})


def _mat(path: Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat  # only here: a fifth of a second

    try:
        content = loadmat(path, variable_names=('X', 'y'))
        images, labels = np.moveaxis(content['X'], 3, 0), content['y'][:, 0]
        labels = np.where(labels == 10, 0, labels)  # the digit 0 is labelled 10
    except Exception as error:  # a broken file may raise almost anything
        raise ValueError(f'{path}: not a whole SVHN file ({error})') from error
    return {'image': images, 'label': labels}


def mnist(path: Path) -> Archive:
    """Returns the data of a folder of the four IDX files, plain or gzipped."""
    parts = idx.read_folder(SimpleNamespace(dir=str(path)))
    return Archive({split: {'image': x, 'label': y} for split, (x, y) in parts.items()}, {})


def _some(names) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


ARCHIVES = {
    'cifar10': cifar10,
    'cifar100': cifar100,
    'svhn_cropped': svhn_cropped,
    'mnist': mnist,
    'fashion_mnist': mnist,
}
