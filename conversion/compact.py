"""A network without what has no effect, ready to be written as ONNX, C or PyTorch."""

from collections.abc import Sequence

import flax.linen as nn

from . import passes
from .graph import Graph
from .trace import trace


def compact(variables: dict, module: nn.Module, image_shape: Sequence[int]) -> Graph:
    """Returns the smallest graph with the same logits, but for rounding, for images [B, H, W, C]
    of image_shape (H, W, C): BatchNorm in the kernels, and see passes.compact. Raises as `trace`
    does where the module does something that is not translated.
    """
    return passes.compact(passes.fold(trace(module, variables, image_shape)))
