import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.config import Part, default
from robustprune_jax.data import Split, Splits
from robustprune_jax.models import create_model
from robustprune_jax.pruning import (
    apply_masks,
    init_scores,
    kept_count,
    sparsity,
    topk_masks,
)
from robustprune_jax.training.start import start_variables


def test_keeps_the_largest_magnitudes_of_each_layer():
    scores = {
        'a': {'kernel': jnp.array([[3.0, -1.0], [0.5, -4.0]])},
        'b': {'kernel': jnp.array([[0.1, 0.2]])},
    }
    masks = topk_masks(scores, 0.5)
    np.testing.assert_array_equal(masks['a']['kernel'], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(masks['b']['kernel'], [[0, 1]])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_among_equal_scores_the_lower_index_wins(dtype):
    scores = {'kernel': jnp.array([1.0, 2.0, -1.0, 1.0, 1.0, 0.0], dtype)}
    np.testing.assert_array_equal(topk_masks(scores, 0.5)['kernel'], [1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize('density', [1.0, 0.9, 0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize('values', ['distinct', 'few', 'zero', 'tiny'])
def test_counts_are_exact(density, values):
    rng = np.random.default_rng(0)
    scores = {
        'distinct': rng.standard_normal(2560),
        'few': rng.integers(-2, 3, 2560),
        'zero': np.zeros(2560),
        'tiny': rng.standard_normal(2560) * 1e-41,  # denormal numbers
    }[values].astype(np.float32)
    mask = np.asarray(topk_masks({'kernel': jnp.array(scores)}, density)['kernel'])
    assert mask.sum() == kept_count(2560, density)
    assert np.abs(scores[mask == 1]).min() >= np.abs(scores[mask == 0]).max(initial=0)


def test_the_fraction_is_truncated_in_python_floats():
    assert kept_count(432, 0.1) == 44  # rounding would keep 43
    assert kept_count(2560, 0.9) == 2305  # 1 - 0.9 is below a tenth: 255 pruned, not 256
    assert kept_count(2_097_152, 0.02) == 2_097_152 - 2_055_208  # float32 prunes one more
    assert kept_count(7, 1) == 7
    for density in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match='density'):
            kept_count(10, density)


def test_gradient_is_straight_through():
    weights = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    scores = jnp.array([[0.1, -0.9], [0.8, 0.0]])
    inputs = jnp.array([[1.0, 2.0]])

    def loss(scores):
        effective = apply_masks({'kernel': weights}, topk_masks({'kernel': scores}, 0.5))
        return jnp.sum((inputs @ effective['kernel']) ** 2)

    # Kept: -2 and 3. outputs = inputs @ [[0, -2], [3, 0]] = [6, -2], so dL/dW_eff = x^T 2 outputs.
    gradient = np.array([[1.0], [2.0]]) @ np.array([[12.0, -4.0]])
    expected = gradient * weights * np.sign(scores)
    np.testing.assert_allclose(jax.grad(loss)(scores), expected)


def test_scaled_scores_rank_as_the_weights_do():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
    params = {'conv': {'kernel': kernel, 'bias': jnp.ones(8)}}
    scores = init_scores(params)
    assert set(scores['conv']) == {'kernel'}
    largest = np.sqrt(6 / (3 * 3 * 4))
    np.testing.assert_allclose(
        scores['conv']['kernel'], largest * kernel / np.abs(kernel).max(), rtol=1e-6
    )


@pytest.mark.parametrize(
    ('how', 'std'),
    [
        ('kaiming_normal', np.sqrt(2 / 400)),
        ('kaiming_uniform', np.sqrt(2 / 400)),
        ('xavier_normal', np.sqrt(2 * 2 / (400 + 100))),
        ('xavier_uniform', np.sqrt(2 * 2 / (400 + 100))),
    ],
)
def test_random_scores_have_torchs_spread(how, std):
    params = {'dense': {'kernel': jnp.zeros((400, 100))}}
    scores = init_scores(params, how, jax.random.key(0))['dense']['kernel']
    assert float(scores.std()) == pytest.approx(std, rel=0.02)
    if 'uniform' in how:
        assert float(jnp.abs(scores).max()) <= std * np.sqrt(3)
    else:
        assert float(jnp.abs(scores).max()) > 3 * std  # not truncated
    with pytest.raises(ValueError, match='key'):
        init_scores(params, how)


def test_any_module_can_be_pruned():
    """A user's module with attention and layer normalisation, unchanged."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.SelfAttention(num_heads=2)(nn.Dense(8)(x)))
            return nn.Dense(3)(x.mean(axis=1))

    module, x = Own(), jnp.ones((2, 5, 4))
    variables = module.init(jax.random.key(0), x)
    scores = init_scores(variables['params'])
    masks = topk_masks(scores, 0.25)
    params = apply_masks(variables['params'], masks)
    assert module.apply({**variables, 'params': params, 'scores': scores}, x).shape == (2, 3)
    report = sparsity({**variables, 'masks': masks})
    assert report['Dense_0'] == {'kept': 8, 'prunable': 32, 'density': 0.25}
    assert report['total']['prunable'] == 32 + 4 * 64 + 24
    assert report['total']['kept'] == sum(int((p != 0).sum()) for p in _kernels(params))


def _kernels(params):
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 2 and leaf.shape != (2, 4)]


def test_what_is_no_mask_is_refused():
    params = {'a': {'kernel': jnp.ones((2, 3))}}
    for masks, message in (
        ({'a': {'kernel': 0.5 * jnp.ones((2, 3))}}, 'a/kernel has other values than 0 and 1'),
        ({'b': {'kernel': jnp.ones((2, 3))}}, r'b/kernel, \(2, 3\), is of no such parameter'),
        ({'a': {'kernel': jnp.ones((2, 1))}}, r'a/kernel, \(2, 1\), is of no such parameter'),
    ):
        with pytest.raises(ValueError, match=message):
            apply_masks(params, masks)
    with pytest.raises(ValueError, match=r"pass variables\['params'\]"):
        init_scores({'params': params})


def test_a_network_without_kernels_is_named():
    with pytest.raises(ValueError, match='has no kernels'):
        sparsity({'params': {'a': {'bias': jnp.ones(2)}}})


def test_the_user_says_what_is_prunable():
    params = {'a': {'kernel': jnp.ones((2, 2))}, 'b': {'kernel': jnp.ones((2, 2))}}
    scores = init_scores(params, prunable=lambda path, leaf: path[0] == 'a')
    assert set(scores) == {'a'}
    assert sparsity({'params': params})['total']['kept'] == 8
    with pytest.raises(ValueError, match='no prunable'):
        init_scores({'a': {'bias': jnp.ones(2)}})


def test_snip_s_scores_are_weights_times_gradients():
    params = {'a': {'kernel': jnp.array([[1.0, -2.0], [0.0, 3.0]]), 'bias': jnp.array([1.0, 1.0])}}
    inputs = jnp.array([2.0, 5.0])

    def loss(params):
        return jnp.sum(inputs @ params['a']['kernel'] + params['a']['bias'])

    scores = init_scores(params, 'snip', loss=loss)
    assert jax.tree.structure(scores) == jax.tree.structure({'a': {'kernel': 0}})
    np.testing.assert_array_equal(scores['a']['kernel'], [[2, 4], [0, 15]])
    with pytest.raises(ValueError, match='looks at data: pass loss='):
        init_scores(params, 'snip')


def test_grasp_s_scores_are_weights_times_the_hessian_times_the_gradient():
    weights, curvature = jnp.array([[1.0], [-2.0], [3.0]]), jnp.array([[1.0], [2.0], [-1.0]])

    def loss(params):
        return jnp.sum(curvature * params['a']['kernel'] ** 2) / 2  # g = c w, H g = c ** 2 w

    scores = init_scores({'a': {'kernel': weights}}, 'grasp', loss=loss)
    np.testing.assert_allclose(scores['a']['kernel'], [[0], [15], [8]])  # 1, 16, 9


def test_snip_normalises_an_untrained_network_by_its_batch():
    """Its running statistics are not those of its images: half of the mask was another one."""
    rng = np.random.default_rng(0)
    train = Split(rng.integers(0, 256, (16, 8, 8, 3), np.uint8), np.arange(16, dtype=np.int32) % 10)
    module = create_model('vgg2_bn')
    images = train.images / np.float32(255)
    source = jax.jit(module.init)(jax.random.key(0), images)
    config = default()
    config.finetune.batch_size = 16
    part = Part('finetune', 'snip', 0.1)
    sparse = start_variables(config, part, source, module, Splits(train, train, train))

    def loss(params):
        logits, _ = module.apply({**source, 'params': params}, images, True, mutable='batch_stats')
        return jnp.mean(cross_entropy(logits, train.labels))

    expected = topk_masks(init_scores(source['params'], 'snip', loss=loss), 0.1)
    same = jax.tree.map(lambda a, b: np.mean(a == b), sparse['masks'], expected)
    assert min(jax.tree.leaves(same)) > 0.99  # rounding may order equals otherwise
