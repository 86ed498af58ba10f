"""VGG for small images, with and without BatchNorm; in neither do convolutions have a bias."""

from functools import partial

import flax.linen as nn
import jax

from . import init
from .layers import batch_norm, conv, dense, flatten, max_pool, normalise

# Widths of the 3x3 convolutions; 'M' is a 2x2 max-pooling.
PLANS = {
    2: (64, 'M', 64, 'M'),
    4: (64, 64, 'M', 128, 128, 'M'),
    6: (64, 64, 'M', 128, 128, 'M', 256, 256, 'M'),
    8: (64, 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M'),
    11: (64, 'M', 128, 'M', 256, 256, 'M', 512, 512, 'M', 512, 512),
    13: (64, 64, 'M', 128, 128, 'M', 256, 256, 'M', 512, 512, 'M', 512, 512),
    16: (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512),
}

# initial distributions of (convolutions, dense layers)
_INITS = {
    'kaiming_normal': (init.kaiming_normal, init.small_normal),
    'kaiming_uniform': (init.kaiming_uniform, init.small_normal),
    'signed_const': (init.signed_constant, init.signed_constant),
}


class VGG(nn.Module):
    """Convolutions, average pooling to 2x2, three dense layers: logits [B, num_classes].

    init_type: 'kaiming_normal', 'kaiming_uniform' or 'signed_const' (every weight +-a constant).
    Raises ValueError for image sizes that do not divide into the 2x2 windows.
    """

    plan: tuple[int | str, ...]
    bn: bool
    num_classes: int = 10
    init_type: str = 'kaiming_normal'
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if self.init_type not in _INITS:
            raise ValueError(f'init_type {self.init_type!r} is none of {", ".join(_INITS)}')
        conv_init, dense_init = _INITS[self.init_type]
        x = normalise(images, self.mean, self.std)
        i = 0
        for features in self.plan:
            if features == 'M':
                x = max_pool(x)
                continue
            i += 1
            x = conv(x, features, 3, padding=1, kernel_init=conv_init, name=f'conv{i}')
            x = nn.relu(batch_norm(x, train, f'bn{i}') if self.bn else x)
        x = flatten(self._average_to_2x2(x, images.shape[1:3]))
        for i, features in enumerate((256, 256), 1):
            x = nn.relu(
                dense(x, features, kernel_init=dense_init, bias=init.zero_bias, name=f'dense{i}')
            )
        return dense(
            x, self.num_classes, kernel_init=dense_init, bias=init.zero_bias, name='dense3'
        )

    def _average_to_2x2(self, x, image_size):
        height, width = x.shape[1:3]
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise ValueError(
                f'{self.name or "VGG"}: images of {image_size[0]}x{image_size[1]} end in a '
                f'{height}x{width} map, which has no four equal quarters; '
                f'use sides that are multiples of {2 ** (self.plan.count("M") + 1)}'
            )
        if (height, width) == (2, 2):
            return x
        window = (height // 2, width // 2)
        return nn.avg_pool(x, window, window)


MODELS = {
    f'vgg{depth}{suffix}': partial(VGG, plan=plan, bn=bool(suffix))
    for depth, plan in PLANS.items()
    for suffix in ('', '_bn')
}
