"""PyTorch checkpoint files, written and read without PyTorch.

The format is a zip of uncompressed records: `data.pkl`, a pickle in which each tensor names its
storage, and one record `data/<key>` of raw bytes per storage. `torch.load(weights_only=True)` reads
what `save_pth` writes, memory-mapped too.
"""

import collections
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

# torch's storage class of each dtype
STORAGES = {
    'FloatStorage': np.dtype(np.float32),
    'DoubleStorage': np.dtype(np.float64),
    'HalfStorage': np.dtype(np.float16),
    'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
    'LongStorage': np.dtype(np.int64),
    'IntStorage': np.dtype(np.int32),
    'ShortStorage': np.dtype(np.int16),
    'CharStorage': np.dtype(np.int8),
    'ByteStorage': np.dtype(np.uint8),
    'BoolStorage': np.dtype(np.bool_),
}
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # of each record's first byte in the file; memory-mapped tensors need it


def save_pth(path: str | os.PathLike, checkpoint: dict) -> None:
    """Writes a file that torch.load(path, weights_only=True) returns as `checkpoint`, in tensors.

    checkpoint: a dict whose values are arrays, str, int, float, bool, None, or dicts, lists and
    tuples of those. The file appears whole or not at all. Arrays are written one at a time.
    Raises ValueError naming the first value that the format cannot hold.
    """
    path = Path(path)
    arrays: list[np.ndarray] = []
    body = pickle.PROTO + b'\x02' + _pickled(checkpoint, 'checkpoint', arrays) + pickle.STOP
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive:
            _write_record(archive, 'data.pkl', body)
            _write_record(archive, 'byteorder', sys.byteorder.encode())
            for key, array in enumerate(arrays):
                data = np.ascontiguousarray(array).reshape(-1)
                _write_record(archive, f'data/{key}', data.view(np.uint8))
            _write_record(archive, 'version', b'3\n')
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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

    Arrays may be read-only, and may share memory where the tensors shared storage. Nothing from the
    file is executed: only tensors, containers, numbers and strings are rebuilt. Raises ValueError,
    in one line, where the file asks for anything else, is truncated, or is no checkpoint.
    """
    with open(path, 'rb') as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f'{path} is truncated, or is no PyTorch checkpoint (no zip file)')
        try:
            return _load_zip(file)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None
        except Exception as error:  # whatever a damaged or hostile file makes the parsers raise
            raise ValueError(f'{path} is damaged: {error!r}') from None


def _load_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = {name.split('/', 1)[-1]: name for name in archive.namelist()}
        if 'data.pkl' not in names:
            raise ValueError('no data.pkl in the zip file, so no PyTorch checkpoint')
        if 'byteorder' in names and archive.read(names['byteorder']).decode() != sys.byteorder:
            raise ValueError(f'written on a machine that is not {sys.byteorder}-endian')
        storages: dict[str, np.ndarray] = {}

        def load_storage(persistent_id):
            kind, dtype, key, _device, size = persistent_id
            if kind != 'storage' or not isinstance(dtype, np.dtype):
                raise ValueError(f'unknown persistent id {kind!r}')
            if key not in storages:
                data = archive.read(names[f'data/{key}'])
                storages[key] = np.frombuffer(data, dtype, count=size)
            return storages[key]

        with archive.open(names['data.pkl']) as body:
            return Unpickler(body, load_storage).load()


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors, containers and numbers, and refuses every other name a pickle asks for.

    load_storage: persistent id -> 1-D array. The functions a pickle may call are all defined here:
    nothing is ever looked up in, or imported from, another module.
    """

    def __init__(self, file: BinaryIO, load_storage: Callable[[tuple], np.ndarray]):
        super().__init__(file, encoding='latin1')
        self._load_storage = load_storage

    def persistent_load(self, persistent_id):
        return self._load_storage(persistent_id)

    def find_class(self, module, name):
        if module == 'torch' and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in _ALLOWED:
            raise ValueError(f'the file asks for {module}.{name}, which is refused; nothing ran')
        return _ALLOWED[module, name]


def _rebuild_tensor(storage, offset, shape, strides, *_ignored) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or min((offset, *shape, *strides), default=0) < 0:
        raise ValueError('a tensor has a negative offset, size or stride')
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.size:
        raise ValueError(f'a tensor of shape {tuple(shape)} reaches beyond its storage')
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides], writeable=False
    )


def _rebuild_parameter(data, *_ignored) -> np.ndarray:
    return data


class _DType:
    """A numpy dtype of numbers; the state a pickle sets on it can only be its byte order."""

    def __init__(self, code, *_ignored):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in 'biufc':
            raise ValueError(f'the file holds numpy values of type {code!r}, which is refused')

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(dtype, data):
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _encode(text, encoding):
    # pickle protocol 2 writes bytes as text in latin1
    if encoding != 'latin1':
        raise ValueError(f'the file asks for the codec {encoding!r}, which is refused')
    return text.encode('latin1')


_ALLOWED = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
    ('numpy', 'dtype'): _DType,
    ('numpy.core.multiarray', 'scalar'): _numpy_scalar,
    ('numpy._core.multiarray', 'scalar'): _numpy_scalar,
    ('_codecs', 'encode'): _encode,
}
