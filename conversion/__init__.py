"""PyTorch checkpoints in and out, without PyTorch; smaller networks with the same logits; ONNX and
VNN-LIB, for other verifiers and from them."""

from .compact import compact
from .from_onnx import read_onnx
from .state_dict import export_state_dict, import_state_dict
from .torch_format import load_pth, save_pth
from .vnnlib import read_vnnlib, to_vnnlib

__all__ = [
    'compact',
    'export_state_dict',
    'import_state_dict',
    'load_pth',
    'read_onnx',
    'read_vnnlib',
    'save_pth',
    'to_vnnlib',
]
