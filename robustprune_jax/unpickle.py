"""An unpickler that rebuilds numbers, containers and NumPy arrays, and refuses everything else."""

import collections
import pickle
from typing import Any, BinaryIO

import numpy as np


class Unpickler(pickle.Unpickler):
    """Calls only what `allowed` maps (module, name) to, and raises ValueError on other names.

    The functions a pickle may call are all defined here or by a subclass: nothing is ever looked up
    in, or imported from, another module.
    """

    allowed: dict[tuple[str, str], Any] = {}  # noqa: RUF012

    def __init__(self, file: BinaryIO, encoding: str = 'latin1'):
        super().__init__(file, encoding=encoding)

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise ValueError(f'the file asks for {module}.{name}, which is refused; nothing ran')
        return self.allowed[module, name]


class _DType:
    """A numpy dtype of numbers; the state a pickle sets on it can only be its byte order."""

    def __init__(self, code, *_ignored):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in 'biufc':
            raise ValueError(f'the file holds numpy values of type {code!r}, which is refused')

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that a pickle makes empty and then fills."""

    def __setstate__(self, state):
        version, shape, dtype, fortran_order, data = state
        # Protocol 2 of Python 2 has text here, and a dtype of objects would hold a list.
        data = data.encode('latin1') if isinstance(data, str) else data
        super().__setstate__((version, shape, dtype.dtype, fortran_order, bytes(data)))


def _empty_array(*_ignored):
    return _Array(0, np.uint8)


def _from_buffer(data, dtype, shape, order):
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _numpy_scalar(dtype, data):
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _encode(text, encoding):
    # pickle protocol 2 writes bytes as text in latin1
    if encoding != 'latin1':
        raise ValueError(f'the file asks for the codec {encoding!r}, which is refused')
    return text.encode('latin1')


SCALARS = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('numpy', 'dtype'): _DType,
    ('numpy.core.multiarray', 'scalar'): _numpy_scalar,
    ('numpy._core.multiarray', 'scalar'): _numpy_scalar,
    ('_codecs', 'encode'): _encode,
}
ARRAYS = {
    **SCALARS,
    ('numpy', 'ndarray'): _Array,
    ('numpy.core.multiarray', '_reconstruct'): _empty_array,
    ('numpy._core.multiarray', '_reconstruct'): _empty_array,
    ('numpy.core.numeric', '_frombuffer'): _from_buffer,
    ('numpy._core.numeric', '_frombuffer'): _from_buffer,
}


class _ArrayUnpickler(Unpickler):
    allowed = ARRAYS


def load_arrays(file: BinaryIO) -> Any:
    """Returns the object of a pickle of numbers, text, containers and numpy arrays of numbers.

    Text of Python 2 is decoded as latin1. Raises ValueError on a name outside the allow-list
    (nothing has run then) and on a file that is no whole pickle.
    """
    try:
        return _ArrayUnpickler(file).load()
    except ValueError:
        raise
    except Exception as error:  # a broken pickle may raise almost anything
        raise ValueError(f'not a sound pickle ({error})') from error
