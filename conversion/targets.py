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


def normalisation(arch: str | Sequence[Layer]) -> tuple:
    """Returns (mean, std) per channel that the architecture has by default, or (None, None)."""
    if not isinstance(arch, str):
        return None, None
    module = create_model(arch)
    return module.mean, module.std


def unwrapped(state_dict: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Returns (state dict without the prefixes of DataParallel and of normalising wrappers,
    {'mean', 'std'} of such a wrapper or {}).

    Raises ValueError where two names then are the same.
    """
    plain = {n.removeprefix('module.').removeprefix('model.'): a for n, a in state_dict.items()}
    if len(plain) < len(state_dict):
        raise ValueError('some tensors have the same name but for module. or model. before it')
    constants = {
        name: plain.pop(f'normalize.{name}').ravel()
        for name in ('mean', 'std')
        if f'normalize.{name}' in plain
    }
    return plain, constants


def check_normalisation(constants: dict, arch: str | Sequence[Layer]) -> None:
    """Raises ValueError where a file normalises its images otherwise than `arch` does here."""
    here = dict(zip(('mean', 'std'), normalisation(arch), strict=True))
    for name, found in constants.items():
        wanted = here[name]
        if found.shape != np.shape(wanted) or not np.allclose(found, wanted, atol=1e-6):
            raise ValueError(
                f'the file normalises images by {name} {found[:3].tolist()}, here it is {wanted}'
            )
