"""An unpickler that rebuilds a PyTorch file's tensors and numbers, and refuses everything else."""

import math
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from robustprune_jax import unpickle

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

# How files from before PyTorch 1.6 begin: the pickled number that torch.save put first.
LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


def load_legacy(file: BinaryIO) -> Any:
    """Returns the contents of a file of the format before PyTorch 1.6, from its start.

    It holds five pickles (magic number, version, machine, the object, the storages' keys), then for
    each storage its number of elements and its bytes. Raises ValueError as load_pth does.
    """
    storages: dict[str, np.ndarray] = {}

    def load_storage(persistent_id):
        kind, dtype, key, _device, size, view = persistent_id
        if kind != 'storage' or not isinstance(dtype, np.dtype):
            raise ValueError(f'unknown persistent id {kind!r}')
        # The bytes come later in the file; tensors are views of this array until then.
        storage = storages.setdefault(key, np.empty(size, dtype))
        if view is None:
            return storage
        _view_key, offset, view_size = view
        return storage[offset : offset + view_size]

    _magic, version, machine = (Unpickler(file, load_storage).load() for _ in range(3))
    if version != 1001 or not machine['little_endian']:
        raise ValueError(f'unknown legacy format {version}, or big-endian')
    result = Unpickler(file, load_storage).load()
    for key in Unpickler(file, load_storage).load():
        storage = storages[key]
        size = int.from_bytes(file.read(8), 'little')
        if size != storage.size or file.readinto(storage.view(np.uint8)) != storage.nbytes:
            raise ValueError('truncated')
    return result


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


class Unpickler(unpickle.Unpickler):
    """Rebuilds tensors, containers and numbers, and refuses every other name a pickle asks for.

    load_storage: persistent id -> 1-D array.
    """

    allowed = {  # noqa: RUF012
        **unpickle.SCALARS,
        **{('torch', name): dtype for name, dtype in STORAGES.items()},
        ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
        ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
        ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
    }

    def __init__(self, file: BinaryIO, load_storage: Callable[[tuple], np.ndarray]):
        super().__init__(file)
        self._load_storage = load_storage

    def persistent_load(self, persistent_id):
        return self._load_storage(persistent_id)
