"""The tensors that torch has and Flax has not: WRN's dead `sub_block1`, and `num_batches_tracked`.

They are carried along in variables['unused'], {torch name: array}. Networks born here have none.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np

from .names import Leaf
from .scores import top_mask


def fill(leaf: Leaf, unused: Mapping, state_dict: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor `leaf` as it was imported, else as a new torch network has it.

    The same at every call. state_dict: the tensors exported so far, among them the dead layer's
    twin in block1, which has the shape.
    """
    name = leaf.torch
    if name.endswith('num_batches_tracked'):
        return np.asarray(unused.get(name, 0), np.int64)
    if name in unused:
        return np.asarray(unused[name])
    shape = state_dict[twin(name)].shape
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith('.popup_scores'):
        bound = math.prod(shape[1:]) ** -0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if leaf.kernel:
        fan_out = shape[0] * math.prod(shape[2:])
        return (rng.standard_normal(shape) * math.sqrt(2 / fan_out)).astype(np.float32)
    ones = name.endswith(('.weight', '.running_var'))
    return np.full(shape, float(ones), np.float32)


def twin(name: str) -> str:
    """Returns the name of the live layer that a dead one repeats."""
    return name.replace('sub_block1', 'block1')


def masked(
    name: str, weight: np.ndarray, kept: int, unused: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns a dead weight pruned to `kept`, by its scores where it has any, else by magnitude.

    Left dense, the dead layers would be most of what is left of a network at density 0.01.
    """
    scores = np.asarray(unused.get(name.replace('.weight', '.popup_scores'), weight))
    return np.where(top_mask(scores, kept) != 0, weight, 0)
