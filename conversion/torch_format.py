"""PyTorch checkpoint files, written and read without PyTorch.

The format is a zip of uncompressed records: `data.pkl`, a pickle in which each tensor names its
storage, and one record `data/<key>` of raw bytes per storage. `torch.load(weights_only=True)` reads
what `save_pth` writes, memory-mapped too.
"""

import collections
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from typing import Any, BinaryIO

import numpy as np

from robustprune_jax.runtime.files import replacing

from .torch_pickle import LEGACY_MAGIC, STORAGES, Unpickler, load_legacy

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # of each record's first byte in the file; memory-mapped tensors need it


def save_pth(path: str | os.PathLike, checkpoint: dict) -> None:
    """Writes a file that torch.load(path, weights_only=True) returns as `checkpoint`, in tensors.

    checkpoint: a dict whose values are arrays, str, int, float, bool, None, or dicts, lists and
    tuples of those. The file appears whole or not at all. Arrays are written one at a time.
    Raises ValueError naming the first value that the format cannot hold.
    """
    arrays: list[np.ndarray] = []
    body = pickle.PROTO + b'\x02' + _pickled(checkpoint, 'checkpoint', arrays) + pickle.STOP
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive,
    ):
        _write_record(archive, 'data.pkl', body)
        _write_record(archive, 'byteorder', sys.byteorder.encode())
        for key, array in enumerate(arrays):
            data = np.ascontiguousarray(array).reshape(-1)
            _write_record(archive, f'data/{key}', data.view(np.uint8))
        _write_record(archive, 'version', b'3\n')


def _write_record(archive: zipfile.ZipFile, name: str, data) -> None:
    info = zipfile.ZipInfo(f'archive/{name}')
    info.file_size = len(data)
    # Local header: 30 bytes, the name, then an extra field (4 bytes of header) that fills up.
    start = archive.fp.tell() + 30 + len(info.filename) + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack('<HH', 0x4246, padding) + bytes(padding)
    with archive.open(info, 'w') as record:
        record.write(data)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


def _pickled(value: Any, where: str, arrays: list[np.ndarray]) -> bytes:
    """Returns the protocol-2 opcodes that push `value`; appends the arrays it meets to `arrays`."""

    def each(values):
        return b''.join(_pickled(v, f'{where}[{i}]', arrays) for i, v in enumerate(values))

    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, '__array__'):
        return _pickled_tensor(np.asarray(value), where, arrays)
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            data = pickle.encode_long(value)
            if len(data) > 255:
                raise ValueError(f'{where} has too many digits for a checkpoint')
            return pickle.LONG1 + bytes([len(data)]) + data
        case float():
            return pickle.BINFLOAT + struct.pack('>d', value)
        case str():
            data = value.encode('utf-8', 'surrogatepass')
            return pickle.BINUNICODE + struct.pack('<I', len(data)) + data
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + each(value) + pickle.APPENDS
        case tuple():
            return pickle.MARK + each(value) + pickle.TUPLE
        case dict():
            ordered = isinstance(value, collections.OrderedDict)
            new = _global('collections', 'OrderedDict') + pickle.EMPTY_TUPLE + pickle.REDUCE
            items = (
                _pickled(key, f'{where} key', arrays) + _pickled(v, f'{where}[{key!r}]', arrays)
                for key, v in value.items()
            )
            return (new if ordered else pickle.EMPTY_DICT) + (
                pickle.MARK + b''.join(items) + pickle.SETITEMS
            )
    raise ValueError(f'{where} is a {type(value).__name__}, which a checkpoint file cannot hold')


def _pickled_tensor(array, where, arrays):
    if array.dtype not in _STORAGE_OF:
        raise ValueError(f'{where} has dtype {array.dtype}, which a checkpoint file cannot hold')
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    key = str(len(arrays))
    arrays.append(array)

    def of(*values):
        return b''.join(_pickled(value, where, arrays) for value in values)

    storage = (
        pickle.MARK
        + of('storage')
        + _global('torch', _STORAGE_OF[array.dtype])
        + of(key, 'cpu', array.size)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    return (
        _global('torch._utils', '_rebuild_tensor_v2')
        + pickle.MARK
        + storage
        + of(0, tuple(array.shape), tuple(strides), False, collections.OrderedDict())
        + pickle.TUPLE
        + pickle.REDUCE
    )


def load_pth(path: str | os.PathLike) -> Any:
    """Returns what a PyTorch checkpoint file holds, numpy arrays for tensors.

    Reads the zip format and the one before PyTorch 1.6. Arrays may be read-only, and may share
    memory where the tensors shared storage. Nothing from the file is executed: only tensors,
    containers, numbers and strings are rebuilt. Raises ValueError, in one line, where the file asks
    for anything else, is truncated, or is no checkpoint.
    """
    with open(path, 'rb') as file:
        start = file.read(len(LEGACY_MAGIC))
        file.seek(0)
        try:
            if start == LEGACY_MAGIC:
                return load_legacy(file)
            if zipfile.is_zipfile(file):
                return _load_zip(file)
        except ValueError as error:
            raise ValueError(f'{path}: {error!s:.200}') from None
        except Exception as error:  # whatever a damaged or hostile file makes the parsers raise
            raise ValueError(f'{path} is damaged: {error!r:.200}') from None
        what = 'truncated' if start.startswith(b'PK') else 'no PyTorch checkpoint'
        raise ValueError(f'{path} is {what}')


def _load_zip(file: BinaryIO) -> Any:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        # Records may also overlap, and each be as large as the file.
        if any(r.compress_type or r.file_size != r.compress_size for r in records) or size < sum(
            r.file_size for r in records
        ):
            raise ValueError(
                'its records are compressed or larger than the file, as torch.save never writes '
                'them; if you trust it, unzip it and zip it again with zip -0 -r'
            )
        names = {name.split('/', 1)[-1]: name for name in archive.namelist()}
        if 'data.pkl' not in names:
            raise ValueError('no data.pkl in the zip file, so no PyTorch checkpoint')
        if 'byteorder' in names and archive.read(names['byteorder']).decode() != sys.byteorder:
            raise ValueError(f'written on a machine that is not {sys.byteorder}-endian')
        storages: dict[str, np.ndarray] = {}

        def load_storage(dtype, key, elements):
            if key not in storages:
                data = archive.read(names[f'data/{key}'])
                storages[key] = np.frombuffer(data, dtype, count=elements)
            return storages[key]

        body = io.BytesIO(archive.read(names['data.pkl']))
        return Unpickler(body, size, load_storage).load()
