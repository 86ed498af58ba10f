import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import formula_images, formula_state_dict
from jax.tree_util import Partial

from conversion import import_state_dict
from robustprune_jax.bounds import jax_verify, margins
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import init_scores


def assert_engines_agree(network, images, labels, eps):
    for method in ('ibp', 'crown_ibp'):
        expected = margins(network, images, labels, eps=eps, method=method)
        found = margins(network, images, labels, eps=eps, method=method, engine='jax_verify')
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=method)


@pytest.mark.parametrize('arch, eps', [('mnist_model', 0.1), ('cifar_model', 8 / 255)])
def test_engines_agree_on_the_originals_networks(arch, eps):
    shape = (3, 1, 28, 28) if arch == 'mnist_model' else (3, 3, 32, 32)
    images, labels = formula_images(shape), np.array([3, 7, 1])
    network = logits_fn(create_model(arch), import_state_dict(formula_state_dict(arch), arch))
    assert_engines_agree(network, images, labels, eps * np.array([0.01, 0.1, 1]))


def test_engines_agree_on_a_masked_network():
    params = import_state_dict(formula_state_dict('mnist_model'), 'mnist_model')['params']
    masks = jax.tree.map(lambda s: np.abs(s) > np.quantile(np.abs(s), 0.9), init_scores(params))
    network = logits_fn(create_model('mnist_model'), {'params': params, 'masks': masks})
    assert_engines_agree(network, formula_images((3, 1, 28, 28)), np.array([3, 7, 1]), 0.02)


class Network(nn.Module):
    """Normalises, and has two activations of one shape; last comes before the last layer."""

    last: str = ''

    @nn.compact
    def __call__(self, x):
        x = (x - jnp.array([0.4, 0.5])) / jnp.array([0.25, 0.2])
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))
        last = {
            '': lambda x: x,
            'reduce_window_max': lambda x: nn.max_pool(x, (2, 2)),
            'transpose': lambda x: x.transpose(0, 3, 1, 2),
            'used more than once': lambda x: x + nn.Dense(4)(x),
        }
        return nn.Dense(5)(last[self.last](x).reshape(len(x), -1))


def network(last=''):
    images = np.random.default_rng(0).uniform(size=(2, 6, 6, 2)).astype(np.float32)
    module = Network(last)
    variables = jax.jit(module.init)(jax.random.key(1), images)
    return Partial(module.apply, variables), images, np.array([0, 3])


def test_engines_agree_where_jax_verify_had_to_be_mended():
    assert_engines_agree(*network(), 0.02)


@pytest.mark.parametrize('last', ['reduce_window_max', 'transpose', 'used more than once'])
def test_networks_left_to_the_native_engine(last):
    with pytest.raises(NotImplementedError, match=f"{last}.*engine='native'"):
        margins(*network(last), eps=0.1, engine='jax_verify')


def test_settings_left_to_the_native_engine():
    for option in ({'method': 'crown'}, {'norm': 'l2'}, {'dtype': jnp.float32}):
        with pytest.raises(ValueError, match="engine='jax_verify' has methods ibp and crown_ibp"):
            margins(*network(), eps=0.1, engine='jax_verify', **option)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jax_verify.src.ibp', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'robustprune_jax\[verify\]'"):
        jax_verify._import()
    assert sys.modules['jax'] is jax
