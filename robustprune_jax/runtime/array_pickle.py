"""An unpickler that rebuilds numbers, containers and NumPy arrays, and refuses everything else."""

import collections
import io
import pickle
import re
from typing import Any, BinaryIO

import numpy as np

# opcodes that call a class, or make a set, which hashes what is in it
_REFUSED = b''.join((
    pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET,
))  # fmt: skip


class Unpickler(pickle._Unpickler):
    """Calls only what `allowed` maps (module, name) to, and raises ValueError on other names.

    The functions a pickle may call are all defined here or by a subclass: nothing is ever looked up
    in, or imported from, another module. Nothing is allocated because a number in the pickle says
    so, as C's unpickler does: `file` must give no more than it has, whatever it is asked to read
    (BytesIO and mmap do). Copies of what is in it end at four times `size`, the whole file's bytes.
    """

    allowed: dict[tuple[str, str], Any] = {}  # noqa: RUF012

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(file, encoding='latin1')
        self._room = 4 * size

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise ValueError(f'the file asks for {module}.{name}, which is refused; nothing ran')
        return self.allowed[module, name]

    def _take(self, size):
        self._room -= size
        if self._room < 0:
            raise ValueError('the file copies its data over and over, which is refused')

    def _reduce(self):
        args = self.stack.pop()
        self.stack[-1] = value = self.stack[-1](*args)
        if isinstance(value, bytes):
            self._take(len(value))

    def _build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _DType | _Array):
            target.__setstate__(state)
            self._take(getattr(target, 'nbytes', 0))
        elif not isinstance(target, collections.OrderedDict):  # those have attributes, for torch
            raise ValueError(f'the file sets attributes of a {type(target).__name__}: refused')

    def _bytearray(self):
        size = int.from_bytes(self.read(8), 'little')
        self.append(bytearray(self.read(size)))

    def _dict(self):
        items = self.pop_mark()
        self.append(_filled({}, zip(items[::2], items[1::2], strict=True)))

    def _setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        _filled(self.stack[-1], [(key, value)])

    def _setitems(self):
        items = self.pop_mark()
        _filled(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _refuse(self):
        raise ValueError('the file makes an object or a set, which is refused; nothing ran')

    dispatch = {  # noqa: RUF012
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        **dict.fromkeys(_REFUSED, _refuse),
    }


def _filled(target, pairs):
    if not isinstance(target, dict):
        raise ValueError(f'the file sets items of a {type(target).__name__}, which is refused')
    for key, value in pairs:
        # nested tuples that share their parts would take for ever to hash
        if not isinstance(key, str | bytes | int | float | None):
            raise ValueError(f'the file has a {type(key).__name__} as key, which is refused')
        target[key] = value
    return target


class _DType:
    """A numpy dtype of numbers; the state a pickle sets on it can only be its byte order."""

    def __init__(self, code, *_ignored):
        if not re.fullmatch(r'[biufc]\d\d?', code):
            raise ValueError(f'the file holds numpy values of type {code!r}, which is refused')
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that a pickle makes empty and then fills."""

    def __setstate__(self, state):
        version, shape, dtype, fortran_order, data = state
        super().__setstate__((version, shape, dtype.dtype, fortran_order, data))


def _ordered_dict(pairs=()):
    ordered = _filled(collections.OrderedDict(), pairs)
    if pairs:
        pairs.clear()  # the list that Python 2 writes; copied once, as no sound file needs it again
    return ordered


def _empty_array(*_ignored):
    return _Array(0, np.uint8)


def _from_buffer(data, dtype, shape, order):
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _numpy_scalar(dtype, data):
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _encode(text, encoding):
    # pickle protocol 2 writes bytes as text in latin1
    if encoding != 'latin1':
        raise ValueError('the file asks for a codec other than latin1, which is refused')
    return text.encode('latin1')


SCALARS = {
    ('collections', 'OrderedDict'): _ordered_dict,
    ('numpy', 'dtype'): _DType,
    ('numpy.core.multiarray', 'scalar'): _numpy_scalar,
    ('numpy._core.multiarray', 'scalar'): _numpy_scalar,
    ('_codecs', 'encode'): _encode,
}
ARRAYS = {
    **SCALARS,
    ('numpy', 'ndarray'): None,  # only named, for _reconstruct
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
    data = file.read()
    try:
        return _ArrayUnpickler(io.BytesIO(data), len(data)).load()
    except ValueError as error:
        raise ValueError(f'{error!s:.200}') from None
    except Exception as error:  # a broken pickle may raise almost anything
        raise ValueError(f'not a sound pickle ({error!s:.200})') from None
