"""Which kept weights lie on a path from the image to a logit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from robustprune_jax.graph.paths import dead_ends, live_weights
from robustprune_jax.models import create_model
from robustprune_jax.pruning import apply_masks, init_scores, sparsity, topk_masks


class Chain(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Dense(3, name='first')(images.reshape(len(images), -1)))
        return nn.Dense(2, name='last')(nn.relu(nn.Dense(3, name='middle')(x)))


def masks_of(first, middle, last):
    layers = {'first': first, 'middle': middle, 'last': last}
    return {name: {'kernel': jnp.array(mask, jnp.float32)} for name, mask in layers.items()}


def test_a_chain_by_hand():
    module = Chain()
    variables = module.init(jax.random.key(0), jnp.ones((1, 1, 2, 1)))
    masks = masks_of(
        [[1, 0, 0], [0, 1, 0]],  # the second unit leads nowhere
        [[1, 0, 0], [0, 0, 0], [0, 1, 0]],  # from the third comes nothing
        [[1, 0], [0, 1], [1, 0]],  # nor from the second and third of the middle
    )
    live, classes = live_weights(module, {**variables, 'masks': masks}, (1, 2, 1))
    expected = masks_of(
        [[1, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[1, 0], [0, 0], [0, 0]]
    )
    jax.tree.map(np.testing.assert_array_equal, live, expected)
    assert classes.tolist() == [True, False]
    counts = sparsity({**variables, 'masks': masks}, module, (1, 2, 1))
    assert [counts[x]['effective'] for x in ('first', 'middle', 'last', 'total')] == [1, 1, 1, 3]
    assert counts['total'] == {'kept': 7, 'effective': 3, 'prunable': 21, 'density': 1 / 3}
    sentences = dead_ends(module, {**variables, 'masks': masks}, (1, 2, 1))
    assert sentences == ['no path of kept weights leads to the classes 1']
    masks['first']['kernel'] = jnp.zeros((2, 3))
    sentences = dead_ends(module, {**variables, 'masks': masks}, (1, 2, 1))
    assert 'none of the 2 kept weights of middle lies on a path' in sentences


@pytest.mark.parametrize('arch', ['wrn_28_1', 'vgg2_bn'])
def test_without_biases_the_other_weights_change_no_logit(arch):
    """Through residual adds, strided convolutions, pooling and BatchNorm."""
    module, images = create_model(arch), jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(module.init)(jax.random.key(0), images)
    params = flatten_dict(variables['params'])
    params = {path: x * (path[-1] != 'bias') for path, x in params.items()}
    variables = {**variables, 'params': unflatten_dict(params)}
    masks = topk_masks(init_scores(variables['params']), 0.005)
    live, _ = live_weights(module, {**variables, 'masks': masks}, (32, 32, 3))
    count = [sum(float(mask.sum()) for mask in jax.tree.leaves(tree)) for tree in (live, masks)]
    assert 0 < count[0] < count[1]
    network = jax.jit(module.apply)
    one, other = (
        network({**variables, 'params': apply_masks(variables['params'], chosen)}, images)
        for chosen in (live, masks)
    )
    np.testing.assert_allclose(one, other, atol=1e-6 * float(jnp.abs(other).max()))
