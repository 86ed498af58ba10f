import math

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from robustprune_jax.bounds import intermediate
from robustprune_jax.models import create_model, resnet
from robustprune_jax.models.layers import batch_norm, conv
from robustprune_jax.network import logits_fn


def initial(arch, size=32, channels=3, **kw):
    """The parameters of a new network, {path: array}."""
    module = create_model(arch, **kw)
    images = jnp.zeros((1, size, size, channels))
    # rbg: this program is nearly all random bits, and threefry's compile three times slower
    variables = jax.jit(module.init)(jax.random.key(0, impl='rbg'), images)
    return {path: np.asarray(a) for path, a in flatten_dict(variables['params'], sep='/').items()}


def assert_normal(array, std):
    assert abs(array.std() / std - 1) < 4 / math.sqrt(2 * array.size)
    assert np.abs(array).max() > 2.2 * std


def assert_uniform(array, bound):
    assert np.abs(array).max() <= bound
    assert np.abs(array).max() > bound * (1 - 10 / array.size)
    assert abs(array.std() / (bound / math.sqrt(3)) - 1) < 4 / math.sqrt(array.size)


def fan_in(kernel):
    return math.prod(kernel.shape[:-1])


def fan_out(kernel):
    return math.prod(kernel.shape[:-2]) * kernel.shape[-1]


def test_mnist_models_start_as_torch_does_by_default():
    params = initial('mnist_model', size=28, channels=1)
    for layer in ('conv1', 'conv2', 'dense1', 'dense2'):
        bound = fan_in(params[f'{layer}/kernel']) ** -0.5
        assert_uniform(params[f'{layer}/kernel'], bound)
        assert np.abs(params[f'{layer}/bias']).max() <= bound
        assert np.abs(params[f'{layer}/bias']).max() > bound / 2


def test_cifar_models_start_with_kaiming_convolutions():
    params = initial('cifar_model_large')
    for i in (1, 2, 3, 4):
        kernel = params[f'conv{i}/kernel']
        assert_normal(kernel, math.sqrt(2 / fan_out(kernel)))
        assert not params[f'conv{i}/bias'].any()
    assert_uniform(params['dense1/kernel'], 4096**-0.5)
    assert_uniform(params['dense1/bias'], 4096**-0.5)


def test_networks_for_bounds_start_as_shi_et_al():
    params = initial('cnn5_bn', size=8)
    for layer in ('conv1', 'conv2', 'conv3', 'dense1'):
        kernel = params[f'{layer}/kernel']
        assert_normal(kernel, math.sqrt(2 * math.pi) / fan_in(kernel))
    assert_uniform(params['dense2/kernel'], 512**-0.5)
    assert [params[f'bn{i}/scale'].size for i in (1, 2, 3, 4)] == [64, 64, 128, 512]
    # Their 17.2 million weights of CNN7 on CIFAR-10 are nearly all of the first dense layer.
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    sizes = jax.eval_shape(create_model('cnn7').init, jax.random.key(0), images)
    assert sizes['params']['dense1']['kernel'].shape == (128 * 16 * 16, 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(sizes)) == 17_190_602


def test_bounds_start_as_wide_in_every_layer():
    """In cnn5 as it is drawn; under the initialisation of torch they would shrink."""
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    module = create_model('cnn5')
    variables = jax.jit(module.init)(jax.random.key(1, impl='rbg'), images)
    layers = intermediate(logits_fn(module, variables), images, eps=0.01, method='ibp', clip=None)
    widths = [float(jnp.mean(layer.upper - layer.lower)) / 2 for layer in layers]
    assert all(0.5 < width / 0.01 < 2.5 for width in widths)


def test_vgg_initial_distributions():
    params = initial('vgg4_bn')
    kernel = params['conv4/kernel']
    assert_normal(kernel, math.sqrt(2 / fan_out(kernel)))
    assert_normal(params['dense1/kernel'], 0.01)
    assert (params['bn4/scale'] == 1).all()
    assert not any(array.any() for path, array in params.items() if path.endswith('bias'))
    params = initial('vgg2', init_type='kaiming_uniform')
    assert_uniform(params['conv2/kernel'], math.sqrt(6 / fan_out(params['conv2/kernel'])))
    assert_normal(params['dense1/kernel'], 0.01)
    params = initial('vgg2', init_type='signed_const')
    for layer in ('conv2', 'dense1'):
        kernel = params[f'{layer}/kernel']
        np.testing.assert_allclose(np.abs(kernel), math.sqrt(2 / fan_in(kernel)), rtol=1e-6)
        assert abs(np.sign(kernel).mean()) < 5 / math.sqrt(kernel.size)


def test_wrn_initial_distributions():
    params = initial('wrn_28_1')
    for path in ('block2_layer0/conv_shortcut/kernel', 'block3_layer3/conv2/kernel'):
        assert_normal(params[path], math.sqrt(2 / fan_out(params[path])))
    assert_uniform(params['fc/kernel'], 64**-0.5)
    assert not params['fc/bias'].any()


def test_resnet_initial_distributions():
    """The CIFAR networks start as torch does by default, those for ImageNet with kaiming_normal."""
    for arch, assert_kernel, bound in (
        ('resnet50', assert_uniform, lambda kernel: fan_in(kernel) ** -0.5),
        ('ResNet50', assert_normal, lambda kernel: math.sqrt(2 / fan_out(kernel))),
    ):
        block = resnet.Block(64, 2, True, create_model(arch).conv_init)
        images = jnp.zeros((1, 4, 4, 64))
        variables = jax.jit(block.init, static_argnums=2)(
            jax.random.key(0, impl='rbg'), images, False
        )
        for layer in ('conv2', 'shortcut_conv'):
            kernel = np.asarray(variables['params'][layer]['kernel'])
            assert_kernel(kernel, bound(kernel))


def test_imagenet_networks_normalise_unless_told_otherwise():
    assert create_model('ResNet50').mean == resnet.IMAGENET_MEAN
    assert create_model('ResNet50', mean=None, std=None).mean is None
    assert create_model('resnet50').mean is None


@pytest.mark.parametrize('arch', golden.BY_FAMILY)
def test_classes_and_hashing(arch):
    module = create_model(arch, num_classes=7)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, 7)
    assert hash(module) == hash(create_model(arch, num_classes=7))
    assert module != create_model(arch, num_classes=8)


def test_normalisation_is_part_of_the_model():
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    plain, normalising = (
        create_model('cifar_model'),
        create_model('cifar_model', mean=mean, std=std),
    )
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(plain.init)(jax.random.key(1, impl='rbg'), images)
    expected = plain.apply(variables, (images - np.array(mean)) / np.array(std))
    np.testing.assert_allclose(normalising.apply(variables, images), expected, atol=1e-6)
    with pytest.raises(ValueError, match='each of 3 channels'):
        create_model('cifar_model', mean=(0.5,), std=(0.5,)).apply(variables, images)


def test_batch_norm_follows_torchs_constants():
    """Training normalises by the batch and moves the statistics a tenth of the way."""
    module = create_model('vgg2_bn')
    images = jax.random.uniform(jax.random.key(0), (16, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(1, impl='rbg'), images)
    logits, state = module.apply(variables, images, train=True, mutable=['batch_stats'])
    features = jax.lax.conv_general_dilated(
        images, variables['params']['conv1']['kernel'], (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    stats = state['batch_stats']['bn1']
    np.testing.assert_allclose(stats['mean'], 0.1 * features.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * features.var((0, 1, 2)), atol=1e-6)
    assert not np.allclose(logits, module.apply(variables, images))


class BatchNormAlone(nn.Module):
    @nn.compact
    def __call__(self, x):
        return batch_norm(x, True, 'bn')


@pytest.mark.parametrize('offset', [30, 1000])
def test_batch_norm_s_variance_is_right_around_a_large_mean(offset):
    """The mean square less the squared mean was 2 to 800 % off there."""
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 4)) + offset
    x = x.astype(np.float32)
    module = BatchNormAlone()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    y, moved = module.apply(variables, x, mutable=['batch_stats'])
    exact = x.astype(np.float64).var(axis=(0, 1, 2))
    var = (moved['batch_stats']['bn']['var'] - 0.9) / 0.1
    np.testing.assert_allclose(var, exact, rtol=1e-4)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1, rtol=1e-4)


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ValueError, match="'wrn_28_5': did you mean 'wrn_28_4'"):
        create_model('wrn_28_5')


@pytest.mark.parametrize(
    ('arch', 'size', 'message'),
    [
        ('vgg16_bn', 28, 'vgg16_bn: images of 28x28 .* multiples of 32'),
        ('vgg4', 12, 'vgg4: images of 12x12 .* multiples of 8'),
        ('wrn_28_4', 3, 'wrn_28_4: images of 3x3 are too small'),
        ('resnet34', 7, 'resnet34: images of 7x7 are too small'),
        ('mnist_model', 1, 'images are too small: conv1 is 4x4 and gets a 1x1 map'),
        ('ResNet18', 28, 'ResNet18: images of 28x28 are too small; both sides must be at least 32'),
    ],
)
def test_impossible_image_sizes_are_named(arch, size, message):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(create_model(arch).init, jax.random.key(0), images)


@pytest.mark.parametrize('padding', [0, 1, 3])
@pytest.mark.parametrize(
    ('size', 'pixels', 'stride'),
    [
        *((size, pixels, 2) for size in (4, 5, 7) for pixels in ((12, 13), (9, 8))),
        *((3, pixels, stride) for stride in (1, 2) for pixels in ((4, 4), (3, 4))),
        (1, (2, 2), 1),
        (1, (4, 3), 2),
    ],
)
def test_convolutions_are_xla_s(size, pixels, stride, padding):
    """On CPU they are computed in another way."""

    class Convolution(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv(x, 5, size, stride=stride, padding=padding, name='conv')

    def ours(x, kernel):
        return Convolution().apply({'params': {'conv': {'kernel': kernel}}}, x)

    def plain(x, kernel):
        pads = [(padding, padding)] * 2
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=numbers
        )

    @jax.jit
    def value_and_gradients(x, kernel):
        results = []
        for function in (ours, plain):
            y, pull_back = jax.vjp(function, x, kernel)
            results.append((y, *pull_back(y)))
        return results

    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, *pixels, 3))
        kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))
        for one, other in zip(*value_and_gradients(x, kernel), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
