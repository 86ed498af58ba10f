"""Weights, images, labels and noise from a formula: what the recorded values were made with.

All shapes are PyTorch's: images NCHW, convolutions OIHW, dense layers (out, in).
"""

import json
import math
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from robustprune_jax.models import create_model
from robustprune_jax.pruning import effective_params

DATA = Path(__file__).parent / 'data'
ARCHITECTURES = json.loads((DATA / 'architectures.json').read_text())

# A network of each family, and of each kind of block; the others are for the night.
_FAMILIES = (
    'mnist_model', 'lin_3', 'vgg4_without_maxpool', 'vgg8_bn', 'wrn_28_4', 'resnet18', 'ResNet50',
    'cifar_model_resnet',
)  # fmt: skip
BY_FAMILY = [
    arch if arch in _FAMILIES else pytest.param(arch, marks=pytest.mark.nightly)
    for arch in ARCHITECTURES
]


def _rng(key: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f'public/{key}'.encode()))


def _formula_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    n = _rng(name).standard_normal(shape)
    if name.endswith('running_var'):
        n = 1 + 0.1 * np.abs(n)
    elif name.endswith(('running_mean', '.bias')):
        n = 0.1 * n
    elif name.endswith('.weight') and len(shape) == 1:
        n = 1 + 0.1 * n
    elif name.endswith('.weight'):
        n = n * np.sqrt(2 / math.prod(shape[1:]))
    return n.astype(np.float32)


def recorded_shapes(arch: str, layout: str = 'dense') -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} in state-dict order; layout 'subnet' adds the layers' scores."""
    shapes = {name: tuple(shape) for name, shape in ARCHITECTURES[arch]['state_dict'].items()}
    if layout == 'dense':
        return shapes
    result = {}
    for name, shape in shapes.items():
        result[name] = shape
        layer, leaf = name.rsplit('.', 1)
        if leaf == 'weight' and len(shape) > 1:
            scores = {f'{layer}.popup_scores': shape}
            if f'{layer}.bias' not in shapes:
                result |= scores
        elif leaf == 'bias' and len(shapes[f'{layer}.weight']) > 1:
            result |= scores
    return result


def formula_state_dict(arch: str, layout: str = 'dense') -> dict[str, np.ndarray]:
    """Returns the formula's state dict {torch name: array}, in state-dict order."""
    return {k: _formula_tensor(k, shape) for k, shape in recorded_shapes(arch, layout).items()}


def formula_images(shape: tuple[int, ...]) -> np.ndarray:
    """Returns images in [0, 1) of this NCHW shape, in NHWC order."""
    return _rng('images').random(shape).astype(np.float32).transpose(0, 2, 3, 1)


def formula_labels(batch: int) -> np.ndarray:
    """Returns labels [batch] of 0..9."""
    return _rng('labels').integers(0, 10, batch)


def formula_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal noise of this NCHW shape, in NHWC order."""
    return _rng('noise').standard_normal(shape).astype(np.float32).transpose(0, 2, 3, 1)


# unoptimised: compiles four times faster, and runs as fast at these sizes
@partial(jax.jit, static_argnums=0, compiler_options={'xla_backend_optimization_level': 0})
def _apply(module, variables, images):
    return module.apply(variables, images)


def logits(arch: str, variables: dict, images: np.ndarray) -> np.ndarray:
    """Returns the network's logits in eval mode, masks applied, images as they are."""
    num_classes = list(recorded_shapes(arch).values())[-1][0]
    module = create_model(arch, num_classes, mean=None, std=None)
    used = {'params': effective_params(variables)}
    if 'batch_stats' in variables:
        used['batch_stats'] = variables['batch_stats']
    return np.asarray(_apply(module, used, images))


def assert_same_state_dict(found: dict, expected: dict) -> None:
    """Asserts the same names in the same order, and arrays equal bit for bit."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
