"""The architectures, as Flax modules with PyTorch's padding, constants and initial distributions.

    module = create_model('wrn_28_4', num_classes=10)
    logits = module.apply(variables, images, train=False)

Images are float32 [B, H, W, C] in [0, 1], logits [B, num_classes].

With train=True, BatchNorm uses the batch's statistics: pass mutable=['batch_stats'] to get the new
running ones. Modules are hashable, so they can be static arguments of jit.
"""

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
    """Returns the Flax module of `arch`.

    kw: fields of its module. All have `mean` and `std`, per-channel constants: the network computes
    on (images - mean) / std. They are ImageNet's for ResNet18, ResNet34 and ResNet50 and None, no
    normalisation, for the others.
    Raises ValueError, with the nearest name, where `arch` is unknown.
    """
    model = lookup(MODELS, arch, 'architecture')
    # Lists would make the module unhashable.
    kw = {name: tuple(value) if isinstance(value, list) else value for name, value in kw.items()}
    # The name appears in error messages; Flax leaves a top-level module's name out of the paths.
    return model(num_classes=num_classes, name=arch, **kw)
