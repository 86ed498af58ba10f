"""The IDX files of the MNIST family (MNIST, Fashion-MNIST, KMNIST, EMNIST), gzipped or plain."""

import struct
import zlib
from pathlib import Path

import numpy as np

FILES = {
    'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
    'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'),
}


def read_folder(dataset) -> dict:
    """Returns {'train': (images, labels), 'test': ...} of the four files in folder `dataset.dir`.

    Images are uint8 [N, H, W, 1], labels int32 [N].
    """
    if not dataset.dir or not Path(dataset.dir).is_dir():
        raise FileNotFoundError(
            f'idx data: dataset.dir={dataset.dir!r} is not a folder; it must hold {_names()}'
        )
    paths = {name: _find(Path(dataset.dir), name) for pair in FILES.values() for name in pair}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f'idx data: {dataset.dir} has no {", ".join(missing)} (plain or with .gz)'
        )
    return {
        part: (read(paths[images], ndim=3)[..., None], read(paths[labels], ndim=1).astype(np.int32))
        for part, (images, labels) in FILES.items()
    }


def read(path: Path, ndim: int) -> np.ndarray:
    """Returns the uint8 array of `ndim` dimensions in one IDX file; raises ValueError otherwise.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values.
    """
    data = _unpack(path)
    header = 4 + 4 * ndim
    if data[:4] != bytes((0, 0, 8, ndim)) and len(data) >= 4:
        raise ValueError(
            f'{path}: magic number 0x{data[:4].hex()}, must be 0x{bytes((0, 0, 8, ndim)).hex()} '
            f'(unsigned bytes, {ndim} dimension{"s" if ndim > 1 else ""})'
        )
    if len(data) < header:
        raise ValueError(f'{path}: truncated: {len(data)} bytes, the header alone has {header}')
    shape = struct.unpack(f'>{ndim}I', data[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        kind = 'truncated' if len(data) < expected else 'too long'
        raise ValueError(
            f'{path}: {kind}: {len(data)} bytes, its header says {expected} for shape {shape}'
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _unpack(path: Path) -> bytes:
    """Returns the content of a file, gunzipped if its name ends in .gz.

    What can be read of a cut-off gzip stream is returned, so that the caller can say how much is
    missing (the gzip module throws it away).
    """
    data = path.read_bytes()
    if path.suffix != '.gz':
        return data
    try:
        return zlib.decompressobj(wbits=31).decompress(data)
    except zlib.error as error:
        raise ValueError(f'{path}: not a sound gzip file ({error})') from error


def _find(folder: Path, name: str) -> Path | None:
    """Returns the file of that name, plain before gzipped, or None."""
    return next((p for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)


def _names() -> str:
    return ', '.join(f'{name}[.gz]' for pair in FILES.values() for name in pair)
