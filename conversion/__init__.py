"""PyTorch checkpoints in and out, without PyTorch."""

from .state_dict import export_state_dict, import_state_dict
from .torch_format import load_pth, save_pth

__all__ = ['export_state_dict', 'import_state_dict', 'load_pth', 'save_pth']
