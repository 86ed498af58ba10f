"""Checkpoint files by their suffix: PyTorch's own formats, and safetensors."""

import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from robustprune_jax.runtime.files import replacing

from .fit import few, not_tensors
from .sparse import packed, unpacked
from .torch_format import load_pth, save_pth

# Where training code keeps the state dict in its file, in the order in which we look.
_STATE_DICT_KEYS = ('state_dict', 'net', 'model', 'model_state_dict')


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Returns (state dict, the file's other fields, such as 'arch' and 'epoch').

    Takes .safetensors, sparse ones too (conversion.sparse), and PyTorch files (.pth, .pt, .pth.tar,
    of any version) that hold a state dict, bare or among other fields. Raises ValueError in one
    line for anything else.
    """
    if Path(path).suffix == '.safetensors':
        try:
            with safetensors.safe_open(path, framework='numpy') as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                fields = file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise ValueError(f'{path} is no safetensors file, or damaged: {error!s:.200}') from None
        except AttributeError as error:  # looking for the tensor's dtype in numpy
            raise ValueError(
                f'{path} holds {error.name}, which is not read: save it as float32'
            ) from None
        shapes = fields.pop('sparse', '{}')
        try:
            return unpacked(tensors, shapes), fields
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f'{path} is a damaged sparse file: {error!s:.200}') from None
    content = load_pth(path)
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, not a state dict')
    for key in _STATE_DICT_KEYS:
        if isinstance(content.get(key), dict):
            fields = {name: value for name, value in content.items() if name != key}
            return _arrays(content[key], path), fields
    return _arrays(content, path), {}


def write_checkpoint(
    path: str | os.PathLike,
    state_dict: dict[str, np.ndarray],
    fields: dict,
    *,
    bare: bool = False,
    sparse: str | None = None,
) -> None:
    """Writes a network to `path`: .safetensors, or else a PyTorch file. The file appears whole.

    fields: what the file says beside the state dict, str, int or float; in a safetensors file as
    text. bare: a PyTorch file of the state dict alone. sparse: the type of the values in a
    safetensors file without its zeros, see conversion.sparse. Raises ValueError where that is
    asked of a PyTorch file.
    """
    if Path(path).suffix != '.safetensors':
        if sparse:
            raise ValueError(f'{path}: a file without its zeros is a .safetensors file')
        save_pth(path, state_dict if bare else {**fields, 'state_dict': state_dict})
        return
    # safetensors writes an array's memory as it lies, whatever its strides
    tensors = {k: np.ascontiguousarray(a).reshape(a.shape) for k, a in state_dict.items()}
    texts = {name: str(v) for name, v in fields.items() if isinstance(v, str | int | float)}
    if sparse:
        tensors, shapes = packed(tensors, sparse)
        texts['sparse'] = json.dumps(shapes)
    with replacing(path) as temporary:
        # not its save_file, whose file only its owner may read
        temporary.write_bytes(safetensors.numpy.save(tensors, texts | {'format': 'pt'}))


def _arrays(state_dict, path):
    others = not_tensors(state_dict)
    if others or not state_dict:
        raise ValueError(f'{path} holds no state dict: {few(others) or "empty"}')
    return state_dict
