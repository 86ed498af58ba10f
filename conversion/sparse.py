"""Tensors that are mostly zeros, as gaps and values: what a sparse .safetensors file holds.

Of a tensor NAME there are NAME.gaps, uint8, and NAME.values, float32 or float16. A gap below 255 is
how many zeros stand before the next value, in the tensor's flat order; 255 stands for as many
zeros without a value after them. The file's metadata say the shapes: 'sparse', JSON {NAME: shape}.
In numpy:

    steps = gaps.astype(int) + (gaps < 255)
    tensor = np.zeros(math.prod(shape), np.float32)
    tensor[np.cumsum(steps)[gaps < 255] - 1] = values
    tensor = tensor.reshape(shape)
"""

import json
import math

import numpy as np

_FULL = 255


def packed(
    tensors: dict[str, np.ndarray], values: str = 'float32'
) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Returns (the tensors of a sparse file, the shapes of those that are gaps and values).

    Those are the float32 tensors that get smaller by it. values: 'float32', exact, or 'float16',
    rounded. Raises ValueError, naming the tensor, where a value is too large for float16.
    """
    found, shapes = {}, {}
    for name, tensor in tensors.items():
        with np.errstate(over='ignore'):
            small = _gaps(tensor), tensor[tensor != 0].astype(values)
        if tensor.dtype != np.float32 or sum(array.nbytes for array in small) >= tensor.nbytes:
            found[name] = tensor
            continue
        if not np.isfinite(small[1]).all():
            raise ValueError(f'{name} has values that {values} cannot hold')
        found |= dict(zip((f'{name}.gaps', f'{name}.values'), small, strict=True))
        shapes[name] = list(tensor.shape)
    return found, shapes


def unpacked(tensors: dict[str, np.ndarray], shapes: str) -> dict[str, np.ndarray]:
    """Returns the tensors that `packed` was given, in float32.

    shapes: JSON, as the metadata hold it. Raises ValueError on gaps and values that are of no
    tensor of that shape.
    """
    found, wanted = dict(tensors), json.loads(shapes)
    for name, shape in wanted.items():
        gaps, values = found.pop(f'{name}.gaps'), found.pop(f'{name}.values')
        gaps = gaps.ravel()
        steps = gaps.astype(int) + (gaps < _FULL)
        size, places = math.prod(shape), np.cumsum(steps)[gaps < _FULL] - 1
        fits = gaps.dtype == np.uint8 and places.shape == values.shape
        if not fits or not 0 <= size - steps.sum() < _FULL:
            raise ValueError(f'{name}: gaps and values are of no tensor of the shape {shape}')
        tensor = np.zeros(size, np.float32)
        tensor[places] = values
        found[name] = tensor.reshape(shape)
    return found


def _gaps(tensor: np.ndarray) -> np.ndarray:
    """The zeros before each value, and after the last as many as fill whole bytes."""
    places = np.append(np.flatnonzero(tensor), tensor.size)
    full, rest = np.divmod(np.diff(places, prepend=-1) - 1, _FULL)
    gaps = np.full(int(full.sum()) + len(places), _FULL, np.uint8)
    gaps[np.cumsum(full + 1) - 1] = rest
    return gaps[:-1]
