"""Who loads an exported network, and how they want it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from robustprune_jax.models import create_model

from .names import Layer


def _as_it_is(state_dict, arch):
    return state_dict


def _in_normalising_wrapper(state_dict, arch):
    """RobustBench's ImageNet models are Sequential(normalize=..., model=...)."""
    mean, std = normalisation(arch)
    if mean is None:
        return state_dict
    return {
        'normalize.mean': np.array(mean, np.float32).reshape(1, -1, 1, 1),
        'normalize.std': np.array(std, np.float32).reshape(1, -1, 1, 1),
        **{f'model.{name}': array for name, array in state_dict.items()},
    }


class Target(NamedTuple):
    """archs, layouts: what it takes (archs None: all). bare: its files hold only the state dict.

    wrap: (state_dict, arch) -> the state dict under the target's names.
    """

    archs: tuple[str, ...] | None = None
    layouts: tuple[str, ...] = ('dense',)
    bare: bool = False
    wrap: Callable[[dict, str], dict] = _as_it_is

    def check(self, arch: str | Sequence[Layer] | None, layout: str) -> None:
        """Raises ValueError where the target does not take this architecture or layout."""
        if self.archs is not None and arch not in self.archs:
            label = arch if isinstance(arch, str) else 'a network of your own'
            raise ValueError(f'this target takes {", ".join(self.archs)}, not {label}')
        if layout not in self.layouts:
            raise ValueError(f'this target takes layout {" or ".join(self.layouts)}, not {layout}')


TARGETS: dict[str, Target] = {
    # the original's own files and classes
    'hydra': Target(layouts=('dense', 'subnet')),
    # WideResNet(sub_block1=True), as of Sehwag2020Hydra; torchvision's ResNets, which normalise
    'robustbench': Target(
        ('wrn_28_10', 'wrn_34_10', 'ResNet18', 'ResNet50'), wrap=_in_normalising_wrapper
    ),
    # the Adversarial Pruning Benchmark's base_resnet18 and base_vgg16
    'benchmark': Target(('resnet18', 'vgg16_bn')),
    # normalised images are the caller's business there
    'torchvision': Target(('ResNet18', 'ResNet34', 'ResNet50'), bare=True),
}


def normalisation(arch: str) -> tuple:
    """Returns (mean, std) per channel that the architecture has by default, or (None, None)."""
    module = create_model(arch)
    return module.mean, module.std


def without_wrapping(
    state_dict: dict[str, np.ndarray], arch: str | Sequence[Layer]
) -> dict[str, np.ndarray]:
    """Returns the state dict without the prefixes of DataParallel and of normalising wrappers.

    Raises ValueError where the wrapper normalises otherwise than `arch` does here.
    """
    state_dict = {name.removeprefix('module.'): array for name, array in state_dict.items()}
    state_dict = {name.removeprefix('model.'): array for name, array in state_dict.items()}
    for name, index in (('normalize.mean', 0), ('normalize.std', 1)):
        if name in state_dict:
            found = state_dict.pop(name).ravel()
            expected = normalisation(arch)[index] if isinstance(arch, str) else None
            if expected is None or not np.allclose(found, expected, atol=1e-6):
                raise ValueError(f'the file has {name} {found.tolist()}, and {arch} has {expected}')
    return state_dict
