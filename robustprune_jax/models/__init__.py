"""The architectures, as Flax modules with PyTorch's padding, constants and initial distributions.

    module = create_model('wrn_28_4', num_classes=10)
    logits = module.apply(variables, images, train=False)

Images are float32 [B, H, W, C] in [0, 1], logits [B, num_classes].

With train=True, BatchNorm uses the batch's statistics: pass mutable=['batch_stats'] to get the new
running ones. Modules are hashable, so they can be static arguments of jit.
"""

import importlib
import inspect
from collections.abc import Callable

import flax.linen as nn

from robustprune_jax.runtime.registry import lookup

from . import cnn, resnet, vgg, wrn

MODELS: dict[str, Callable[..., nn.Module]] = {
    **cnn.MODELS,
    **vgg.MODELS,
    **wrn.MODELS,
    **resnet.MODELS,
}


def create_model(arch: str, num_classes: int = 10, **kw) -> nn.Module:
    """Returns the Flax module of `arch`: a name of MODELS, or 'package.module:Name', what is to be
    imported: a Linen module, or a function that returns one.

    num_classes goes to every architecture, and to an imported one that takes it. kw: fields of the
    module. Those of MODELS have `mean` and `std`, per-channel constants: the network computes on
    (images - mean) / std. They are ImageNet's for ResNet18, ResNet34 and ResNet50 and None, no
    normalisation, for the others.
    Raises ValueError where `arch` is unknown, with the nearest name, or cannot be imported, or is
    no module that can be called as module(images, train=False) and hashed.
    """
    # Lists would make the module unhashable.
    kw = {name: tuple(value) if isinstance(value, list) else value for name, value in kw.items()}
    if ':' in arch:
        return _imported(arch, num_classes, kw)
    model = lookup(MODELS, arch, 'architecture')
    # The name appears in error messages; Flax leaves a top-level module's name out of the paths.
    return model(num_classes=num_classes, name=arch, **kw)


def register(name: str, model: Callable[..., nn.Module]) -> None:
    """Makes `model` known as the architecture `name` in this process.

    model: called with num_classes=, name= and the fields that create_model was given. Raises
    ValueError on a name that is taken.
    """
    if name in MODELS or ':' in name:
        raise ValueError(f'{name!r} is taken, or has a colon: choose another name')
    MODELS[name] = model


def _imported(arch, num_classes, kw):
    path, _, name = arch.partition(':')
    try:
        model = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{arch} cannot be imported ({error}): expected package.module:Name, on PYTHONPATH'
        ) from None
    takes = inspect.signature(model).parameters if callable(model) else {}
    if 'num_classes' in takes:
        kw = {'num_classes': num_classes, **kw}
    try:
        module = model(**kw)
        hash(module)
        inspect.signature(module.__call__).bind(None, train=False)
    except TypeError as error:
        raise ValueError(
            f'{arch} is no Flax module with __call__(self, images, train=False) and hashable '
            f'fields, such as tuples for lists: {error}'
        ) from None
    if not isinstance(module, nn.Module):
        raise ValueError(f'{arch} makes a {type(module).__name__}: expected a flax.linen.Module')
    return module
