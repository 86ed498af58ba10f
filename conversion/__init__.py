"""PyTorch checkpoints in and out, without PyTorch; smaller networks with the same logits."""

from .compact import compact
from .state_dict import export_state_dict, import_state_dict
from .torch_format import load_pth, save_pth

__all__ = ['compact', 'export_state_dict', 'import_state_dict', 'load_pth', 'save_pth']
