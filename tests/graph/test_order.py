"""The order in which an image meets a network's kernels."""

import pytest

from conversion.names import leaves
from robustprune_jax.graph.order import kernels_in_order
from robustprune_jax.models import create_model


@pytest.mark.parametrize('arch', ['mnist_model', 'vgg4_bn', 'wrn_28_1', 'resnet18', 'ResNet50'])
def test_kernels_from_the_image_to_the_logits(arch):
    image_shape = (64, 64, 3) if arch == 'ResNet50' else (32, 32, 3)
    found = ['/'.join(path) for path in kernels_in_order(create_model(arch), image_shape)]
    named = [leaf.path for leaf in leaves(arch) if leaf.kernel and leaf.path]
    assert sorted(found) == sorted(named)
    assert (found[0], found[-1]) == (named[0], named[-1])
