"""Lines around curves and products, by hand and against points between them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_bounds import sampled_margins

from robustprune_jax.bounds import margins
from robustprune_jax.bounds.curves import SHAPES, Curve
from robustprune_jax.bounds.product import Product

FUNCTIONS = {
    'abs': jnp.abs,
    'erf': jax.lax.erf,
    'exp': jnp.exp,
    'expm1': jnp.expm1,
    'log': jnp.log,
    'log1p': jnp.log1p,
    'logistic': jax.nn.sigmoid,
    'reciprocal': lambda x: 1 / x,
    'rsqrt': jax.lax.rsqrt,
    'sqrt': jnp.sqrt,
    'square': jnp.square,
    'tanh': jnp.tanh,
}


@pytest.mark.parametrize('name', SHAPES)
def test_a_curve_lies_between_its_lines(name):
    rng = np.random.default_rng(0)
    lower = rng.normal(0, 2, 300)
    lower[:20] = 0.3  # also where an interval is a point, or nearly
    upper = lower + np.where(np.arange(300) < 20, 10.0 ** -np.arange(300), rng.exponential(2, 300))
    shape = SHAPES[name]
    with jax.enable_x64(True):
        inside = np.asarray(shape.domain(jnp.array(lower), jnp.array(upper)))
        lower, upper = jnp.array(lower[inside]), jnp.array(upper[inside])
        assert len(lower) > 50
        node = Curve((0,), FUNCTIONS[name], shape)
        x = lower + jnp.linspace(0, 1, 101)[:, None] * (upper - lower)
        values = FUNCTIONS[name](x)
        slack = 1e-9 * (1 + jnp.abs(values))
        low, high = node.interval((lower, upper))
        assert (low - slack <= values).all() and (values <= high + slack).all()
        below, above = shape.lines(FUNCTIONS[name], lower, upper)
        assert (below[0] * x + below[1] <= values + slack).all()
        assert (values <= above[0] * x + above[1] + slack).all()
        # The interval is the least one.
        ends = values[jnp.array([0, -1])]
        np.testing.assert_allclose(high, ends.max(axis=0))
        if not shape.turns:
            np.testing.assert_allclose(low, ends.min(axis=0))


def test_lines_by_hand():
    square = Curve((0,), jnp.square, SHAPES['square'])
    bounds = jnp.array([-1.0]), jnp.array([3.0])
    assert [float(x[0]) for x in square.interval(bounds)] == [0, 9]
    below, above = square.shape.lines(jnp.square, *bounds)
    assert [float(x[0]) for x in (*below, *above)] == [2, -1, 2, 3]  # 2 x - 1 <= x ** 2 <= 2 x + 3
    constants, (of_x,) = square.backward(jnp.array([[1.0], [-1.0]]), None, bounds)
    assert of_x.tolist() == [[2], [-2]] and constants[0].tolist() == [-1, -3]
    tanh = Curve((0,), jnp.tanh, SHAPES['tanh'])
    below, above = tanh.shape.lines(jnp.tanh, jnp.array([0.0]), jnp.array([1.0]))
    slope = 1 - np.tanh(1) ** 2
    np.testing.assert_allclose([below[0][0], above[0][0]], slope, rtol=1e-6)
    np.testing.assert_allclose(above[1][0], np.tanh(1) - slope, rtol=1e-6)
    log = Curve((0,), jnp.log, SHAPES['log'])
    low, high = log.interval((jnp.array([0.0, 1.0]), jnp.array([1.0, np.e])))
    assert low.tolist() == [-np.inf, 0] and high[0] == np.inf


def test_a_product_by_hand():
    """x in [-1, 2], y in [3, 5]."""
    x, y = (jnp.array([-1.0]), jnp.array([2.0])), (jnp.array([3.0]), jnp.array([5.0]))
    node = Product((0, 1))
    assert [float(z[0]) for z in node.interval(x, y)] == [-5, 10]
    constants, (of_x, of_y) = node.backward(jnp.array([[1.0], [-1.0]]), None, x, y)
    # x y >= 3 x - y + 3, and -x y >= -5 x + y - 5
    assert constants[0].tolist() == [[3], [-5]]
    assert of_x.tolist() == [[3], [-5]] and of_y.tolist() == [[-1], [1]]


class Smooth(nn.Module):
    """Gates, norms and smooth activations as modules of today have them."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(4)(x.reshape(len(x), -1)))
        x = nn.LayerNorm()(x) * nn.sigmoid(x[:, :1]) + x**3
        x = nn.gelu(nn.Dense(3)(x), approximate=False) / (1 + jnp.abs(x[:, :3]))
        return nn.Dense(3)(jnp.sqrt(1 + x**2) - jnp.log1p(jnp.exp(jnp.tanh(x))))


@pytest.mark.parametrize('method', ['ibp', 'crown_ibp', 'crown'])
def test_random_points_never_violate_a_bound_of_a_smooth_network(method):
    images = jax.random.uniform(jax.random.key(0), (2, 3, 3, 1))
    variables = jax.jit(Smooth().init)(jax.random.key(1), images)
    network, labels, eps = Partial(Smooth().apply, variables), jnp.arange(2), 0.002
    lower = np.asarray(margins(network, images, labels, eps=eps, method=method))
    sampled = sampled_margins(network, images, labels, eps)
    assert (lower <= sampled + 1e-5 * np.abs(sampled).max()).all()
    assert (lower > sampled - 0.3 * np.abs(sampled).max()).all()
