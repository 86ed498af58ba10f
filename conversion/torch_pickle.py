"""An unpickler that rebuilds a PyTorch file's tensors and numbers, and refuses everything else."""

import math
import mmap
import os
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from robustprune_jax.runtime import array_pickle as unpickle

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
    size = left = os.fstat(file.fileno()).st_size

    def load_storage(dtype, key, elements, view):
        nonlocal left
        if key not in storages:
            left -= elements * dtype.itemsize
            if left < 0:
                raise ValueError('its tensors are larger than the file')
            # The bytes come later in the file; tensors are views of this array until then.
            storages[key] = np.empty(elements, dtype)
        if view is None:
            return storages[key]
        _view_key, offset, view_size = view
        return storages[key][offset : offset + view_size]

    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _magic, version, machine, result, keys = (
            Unpickler(data, size, load_storage).load() for _ in range(5)
        )
        if version != 1001 or not machine['little_endian']:
            raise ValueError('unknown legacy format, or big-endian')
        if not all(isinstance(key, str) for key in keys) or set(keys) != storages.keys():
            raise ValueError('its list of storages is not that of its tensors')
        for key in keys:
            storage = storages[key]
            elements, content = int.from_bytes(data.read(8), 'little'), data.read(storage.nbytes)
            if elements != storage.size or len(content) != storage.nbytes:
                raise ValueError('truncated')
            storage[:] = np.frombuffer(content, storage.dtype)
    return result


def _rebuild_tensor(storage, offset, shape, strides, *_ignored) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or not storage.flags.c_contiguous:
        raise ValueError('a tensor has no storage')
    numbers = (offset, *shape, *strides)
    if len(numbers) > 64 or not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise ValueError('a tensor has a negative offset, size or stride, or too many of them')
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if elements and last >= storage.size:
        raise ValueError(f'a tensor of shape {tuple(shape)} reaches beyond its storage')
    if elements > storage.size:  # where strides are 0
        raise ValueError(f'a tensor of shape {tuple(shape)} has more elements than its storage')
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides], writeable=False
    )


def _rebuild_parameter(data, *_ignored) -> np.ndarray:
    return data


class Unpickler(unpickle.Unpickler):
    """Rebuilds tensors, containers and numbers, and refuses every other name a pickle asks for.

    load_storage: (dtype, key, number of elements, and what legacy files add) -> 1-D array.
    """

    allowed = {  # noqa: RUF012
        **unpickle.SCALARS,
        **{('torch', name): dtype for name, dtype in STORAGES.items()},
        ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
        ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
        ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
    }

    def __init__(self, file: BinaryIO, size: int, load_storage: Callable[..., np.ndarray]):
        super().__init__(file, size)
        self._load_storage = load_storage

    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except ValueError as error:
            raise ValueError(f'{error}; of a module, save its state_dict()') from None

    def persistent_load(self, persistent_id):
        kind, dtype, key, _device, elements, *view = persistent_id
        types = isinstance(dtype, np.dtype), isinstance(key, str), isinstance(elements, int)
        if kind != 'storage' or not all(types) or elements < 0:
            raise ValueError('the file refers to something that is no storage')
        return self._load_storage(dtype, key, elements, *view)
