"""Whole channels: which can only go together, and masks of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import Mixed, drawn

from robustprune_jax.graph.coupling import coupled_units
from robustprune_jax.models import create_model
from robustprune_jax.models.resnet import ResNet
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import (
    Budget,
    Choice,
    apply_masks,
    choose_masks,
    init_scores,
    topk_masks,
    training_masks,
)


def test_streams_and_inner_widths_of_a_residual_network():
    coupling = coupled_units(create_model('resnet18'), (32, 32, 3))
    sizes = np.bincount(coupling.group)
    assert sorted(sizes) == sorted([64, 128, 256, 512] + 2 * [64, 128, 256, 512])
    made = {'/'.join(path[:-1]): units for path, units in coupling.made.items()}
    np.testing.assert_array_equal(made['layer2_block0/conv2'], made['layer2_block1/conv2'])
    np.testing.assert_array_equal(made['layer2_block0/conv2'], made['layer2_block0/shortcut_conv'])
    assert not set(made['layer2_block0/conv1']) & set(made['layer2_block0/conv2'])
    assert (made['fc'] == -1).all()
    assert (coupling.read['conv1', 'kernel'] == -1).all()


def test_depthwise_grouped_concatenated_and_gated():
    coupling = coupled_units(Mixed(), (8, 8, 3))
    made = {path[0]: units.tolist() for path, units in coupling.made.items()}
    # A part of `grouped` takes 3 of the 12: each two of `depthwise` are of one channel of `conv`,
    # so that parts 0 and 1 share the second channel, 2 and 3 the fifth.
    assert made['conv'] == [0, 0, 0, 1, 1, 1]
    assert made['depthwise'] == made['grouped'] == [0] * 6 + [1] * 6
    assert len(set(made['branch'])) == 5 and len(set(made['gate1'])) == 3
    assert made['gate2'] == made['grouped'] + made['branch']
    assert coupling.read['head', 'kernel'].tolist() == 4 * made['gate2']
    assert {path[0] for path in coupling.read} == {'conv', 'branch', 'gate1', 'gate2', 'head'}
    assert coupling.positions['conv', 'kernel'] == 64 and coupling.positions['head', 'kernel'] == 1


def test_what_reads_all_channels_at_once_makes_them_one():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = nn.LayerNorm()(nn.Conv(4, (3, 3), name='conv')(images))
            return nn.Dense(2, name='head')(nn.Dense(3, name='inner')(x.mean(axis=(1, 2))))

    assert np.bincount(coupled_units(Normed(), (4, 4, 1)).group).tolist() == [1, 3]


def test_an_operation_without_a_rule_is_named_with_its_line():
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(2)(jnp.sort(nn.Dense(3)(images.reshape(1, -1)), axis=-1))

    with pytest.raises(NotImplementedError, match=r"through 'sort' is unknown, at .*test_channels"):
        coupled_units(Sorted(), (2, 2, 1))


@pytest.mark.parametrize(
    ('arch', 'size', 'density'),
    [
        ('wrn_28_1', 32, 0.1),
        ('resnet18', 32, 0.02),
        pytest.param('ResNet50', 32, 0.05, marks=pytest.mark.nightly),
        (ResNet(blocks=(1, 2, 0, 0), bottleneck=True, imagenet_stem=True), 32, 0.1),
        ('vgg11_bn', 32, 0.1),
        ('mnist_model', 28, 0.05),
        (Mixed(), 8, 0.7),
    ],
)
def test_removing_channels_is_masking_them(arch, size, density):
    module = create_model(arch) if isinstance(arch, str) else arch
    image_shape = (size, size, 1 if arch == 'mnist_model' else 3)
    variables = drawn(module, image_shape)
    scores = init_scores(variables['params'])
    coupling = coupled_units(module, image_shape)
    masks = jax.jit(
        lambda scores: topk_masks(scores, density, 'global', 'channels', coupling=coupling)
    )(scores)
    variables['masks'] = masks
    sizes = [mask.size for mask in jax.tree.leaves(masks)]
    kept = [int(mask.sum()) for mask in jax.tree.leaves(masks)]
    assert 0.65 * density < sum(kept) / sum(sizes) <= density
    images = jax.random.uniform(jax.random.key(1), (2, *image_shape))
    masked = jax.jit(logits_fn(module, variables))(images)
    found, smaller = _removed(module, variables, images)
    scale = np.abs(masked).max()
    np.testing.assert_allclose(found / scale, masked / scale, atol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(smaller['params'])) < sum(kept) + 0.1 * sum(
        sizes
    )
    logits = jax.jit(_apply_smaller, static_argnums=0)(module, smaller, images)
    np.testing.assert_allclose(logits / scale, masked / scale, atol=1e-6)


LAYERS = nn.Conv | nn.Dense | nn.BatchNorm


def _removed(module, variables, images):
    """The logits with infinity in all channels that nothing may read, and the variables without
    them."""
    masks = flatten_dict(variables['masks'])
    live = {path: mask.any(axis=tuple(range(mask.ndim - 1))) for path, mask in masks.items()}

    @jax.jit
    def logits_and_gaps(variables, images):
        gaps = {}

        def intercept(call, args, kwargs, context):
            layer, (x, *rest) = context.module, args
            if not isinstance(layer, LAYERS) or not isinstance(x, jax.Array):
                return call(*args, **kwargs)
            gaps.setdefault(layer.path, jnp.isinf(x))
            if isinstance(layer, nn.BatchNorm):
                return call(*args, **kwargs)
            outputs = call(jnp.where(jnp.isinf(x), 0, x), *rest, **kwargs)
            return jnp.where(live[(*layer.path, 'kernel')], outputs, jnp.inf)

        with nn.intercept_methods(intercept):
            return module.apply(variables, images, train=False), gaps

    params = apply_masks(variables['params'], variables['masks'])
    logits, gaps = logits_and_gaps({**variables, 'params': params}, images)
    smaller = {}
    for (collection, *path), leaf in flatten_dict({**variables, 'masks': {}}).items():
        if not path:
            continue
        layer, gap = tuple(path[:-1]), np.asarray(gaps[tuple(path[:-1])])
        read = ~gap.all(axis=tuple(range(gap.ndim - 1)))
        assert (gap == ~read).all()  # a channel is gone everywhere, or nowhere
        if path[-1] == 'kernel' and leaf.shape[-2] == len(read):
            leaf = leaf[..., read, :]
        smaller[collection, *path] = leaf[..., live.get((*layer, 'kernel'), read)]
    return logits, unflatten_dict(smaller)


def _apply_smaller(module, variables, images):
    """The same module with as many features as the variables have."""
    params = flatten_dict(variables['params'])

    def intercept(call, args, kwargs, context):
        layer = context.module
        if (stream := params.get((*layer.path, 'conv2', 'kernel'))) is not None and layer.path:
            object.__setattr__(layer, 'features', stream.shape[-1])  # no shortcut where none was
        if isinstance(layer, nn.Conv | nn.Dense):
            kernel = params[(*layer.path, 'kernel')]
            object.__setattr__(layer, 'features', kernel.shape[-1])
            if getattr(layer, 'feature_group_count', 1) > 1:
                groups = args[0].shape[-1] // kernel.shape[-2]
                object.__setattr__(layer, 'feature_group_count', groups)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return module.apply(variables, images, train=False)


@pytest.mark.parametrize('allocation', ['uniform', 'erk', 'igq', 'power', 'global', 'lamp'])
@pytest.mark.parametrize('counts', ['weights', 'multiply_adds'])
def test_the_budget_holds(allocation, counts):
    image_shape = (8, 8, 1)
    module = create_model('mnist_model')
    scores = init_scores(drawn(module, image_shape)['params'], 'kaiming_normal', jax.random.key(1))
    coupling = coupled_units(module, image_shape)
    for density in (1.0, 0.5, 0.1, 0.01):
        masks = topk_masks(
            scores, density, allocation, 'channels', coupling=coupling, counts=counts
        )
        masks = flatten_dict(masks)
        places = coupling.positions if counts == 'multiply_adds' else dict.fromkeys(masks, 1)
        kept = sum(places[path] * int(mask.sum()) for path, mask in masks.items())
        size = sum(places[path] * mask.size for path, mask in masks.items())
        assert 0.6 * density * size < kept <= density * size
        assert all(mask.any() for mask in masks.values())
    with pytest.raises(ValueError, match=r'density 0.0001 has room for \d+ .*, and one channel'):
        topk_masks(scores, 0.0001, allocation, 'channels', coupling=coupling, counts=counts)


def test_a_network_without_hidden_layers_has_no_channels():
    module, image_shape = create_model('lin_1'), (4, 4, 1)
    scores = init_scores(drawn(module, image_shape)['params'])
    with pytest.raises(ValueError, match='no channel of the network can go'):
        coupling = coupled_units(module, image_shape)
        topk_masks(scores, 0.5, structure='channels', coupling=coupling)


class Chain(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Dense(4, name='first')(images.reshape(len(images), -1)))
        return nn.Dense(3, name='last')(x)


def test_two_layers_by_hand():
    # Norms of the columns: 5, 1, 2, 13. A unit costs 2 + 3 weights, and the network has 20.
    first = jnp.array([[3.0, 1.0, 0.0, 5.0], [-4.0, 0.0, 2.0, -12.0]])
    scores = {'first': {'kernel': first}, 'last': {'kernel': jnp.ones((4, 3))}}
    coupling = coupled_units(Chain(), (1, 2, 1))
    masks = topk_masks(scores, 0.5, structure='channels', coupling=coupling)
    np.testing.assert_array_equal(masks['first']['kernel'], [[1, 0, 0, 1]] * 2)
    np.testing.assert_array_equal(masks['last']['kernel'], np.outer([1, 0, 0, 1], [1, 1, 1]))
    equal = jax.tree.map(jnp.ones_like, scores)  # ties: the first
    masks = topk_masks(equal, 0.25, structure='channels', coupling=coupling)
    np.testing.assert_array_equal(masks['first']['kernel'], [[1, 0, 0, 0]] * 2)
    with pytest.raises(ValueError, match="needs the network's graph: pass coupling="):
        topk_masks(scores, 0.5, structure='channels')


def test_a_unit_gets_the_gradient_of_what_it_is_worth():
    """That of a factor on what the unit gives, at 1 where it stays and at 0 where it went."""
    module, image_shape = Mixed(), (8, 8, 3)
    variables = drawn(module, image_shape)
    variables['scores'] = init_scores(variables['params'])
    coupling = coupled_units(module, image_shape)
    choice = Choice(Budget(0.5, coupling=coupling), 'uniform', 'channels')
    images = jax.random.uniform(jax.random.key(1), (2, *image_shape))

    def loss(params):
        logits = module.apply({**variables, 'params': params}, images)
        return jnp.sum(logits**2)

    def of_scores(scores):
        masks = training_masks(choice, {**variables, 'scores': scores})
        return loss(apply_masks(variables['params'], masks)), masks

    of_scores = jax.jit(jax.value_and_grad(of_scores, has_aux=True))
    (value, masks), gradient = of_scores(variables['scores'])
    saved = choose_masks(choice, variables)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (masks, saved)), strict=True))
    # Nothing reads a removed unit: the network in training is the one that is saved.
    np.testing.assert_allclose(value, loss(apply_masks(variables['params'], saved)), rtol=1e-6)

    @jax.jit
    @jax.grad
    def gain(amount, unit):
        factors = flatten_dict(masks)
        for path in (('gate1', 'kernel'), ('head', 'kernel')):
            of_unit = coupling.read[path] == unit
            factors[path] = jnp.where(of_unit[:, None], amount, factors[path])
        return loss(apply_masks(variables['params'], unflatten_dict(factors)))

    stays = []
    for column, unit in enumerate(coupling.made['branch', 'kernel']):
        row = np.argmax(coupling.read['head', 'kernel'] == unit)
        stays.append(float(masks['head']['kernel'][row, 0]))
        scores = variables['scores']['branch']['kernel'][..., column]
        found = gradient['branch']['kernel'][..., column]
        gates = variables['scores']['gate2']['kernel'][:, 12 + column]  # of the same unit
        worth = jnp.sqrt((jnp.sum(scores**2) + jnp.sum(gates**2)) / 2)
        expected = gain(stays[-1], unit) * scores / (2 * worth)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert set(stays) == {0, 1}
