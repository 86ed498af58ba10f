"""How a network's budget is shared out over its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import ARCHITECTURES, recorded_shapes

from conversion.names import leaves
from robustprune_jax.pruning import kept_count, topk_masks
from robustprune_jax.pruning.allocation import ALLOCATIONS, Budget, lamp

BY_SIZE = ('erk', 'igq', 'power')
MNIST = {
    'conv1': (4, 4, 1, 16),
    'conv2': (4, 4, 16, 32),
    'dense1': (1568, 100),
    'dense2': (100, 10),
}


def structs(shapes):
    return {(name,): jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ('allocation', 'kept'),
    [
        ('uniform', [3, 82, 1568, 10]),
        ('erk', [22, 50, 1492, 99]),
        ('power', [50, 282, 1233, 98]),  # 16, 90.5, 396 and 31.6 times 3.114
    ],
)
def test_a_hundredth_of_mnist_model(allocation, kept):
    found = ALLOCATIONS[allocation].kept(structs(MNIST), Budget(0.01))
    assert list(found.values()) == kept


def test_igq_s_fractions_fall_with_size():
    scores = structs(MNIST)
    kept = ALLOCATIONS['igq'].kept(scores, Budget(0.01))
    odds = [leaf.size / kept[path] - 1 for path, leaf in scores.items()]  # 1 / d - 1 = F n
    sizes = [leaf.size for leaf in scores.values()]
    np.testing.assert_allclose(np.divide(odds, sizes), odds[2] / sizes[2], rtol=0.02)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_the_network_keeps_its_budget_exactly(arch):
    shapes, kernels = recorded_shapes(arch), {}
    for leaf in leaves(arch):
        if leaf.kernel and leaf.path:
            out, features, *window = shapes[leaf.torch]
            kernels[leaf.path] = (*window, features, out)
    scores = structs(kernels)
    size, head = sum(leaf.size for leaf in scores.values()), list(scores)[-1]
    for allocation in BY_SIZE:
        for density in (1.0, 0.9, 0.1, 1 / 3, 0.01, 0.0005):
            budget = Budget(density, head=head, per_class=1)
            if kept_count(size, density) < len(scores) + 9:
                with pytest.raises(ValueError, match=f'density {density:g} keeps'):
                    ALLOCATIONS[allocation].kept(scores, budget)
                continue
            kept = ALLOCATIONS[allocation].kept(scores, budget)
            assert sum(kept.values()) == kept_count(size, density)
            assert all(1 <= kept[path] <= leaf.size for path, leaf in scores.items())
            assert kept[head] >= 10


def scores_of(rng, **shapes):
    return {
        name: jnp.array(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }


def test_one_threshold_over_the_network():
    scores = {'a': jnp.array([3.0, -1.0, 0.5]), 'b': jnp.array([[0.1, 2.0], [0.2, -0.3]])}
    masks = topk_masks(scores, 3 / 7, 'global')
    np.testing.assert_array_equal(masks['a'], [1, 1, 0])
    np.testing.assert_array_equal(masks['b'], [[0, 1], [0, 0]])
    # One of each layer at least, here the largest of b; equals go to the lower index.
    scores = {'a': jnp.ones(5), 'b': jnp.array([[0.1, 0.2]])}
    masks = topk_masks(scores, 3 / 7, 'global')
    np.testing.assert_array_equal(masks['a'], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(masks['b'], [[0, 1]])


@pytest.mark.parametrize('allocation', ['global', 'lamp', 'power'])
def test_no_layer_keeps_less_than_its_minimum(allocation):
    # a's share of 4 in 20 is 2: half of that is 1; b's, of 10, is 5 by itself.
    scores = {'a': 9.0 + jnp.arange(4.0), 'b': 0.1 * jnp.arange(16.0)}
    kept = {}
    for minimum in (0.0, 0.5, 1.0):
        masks = topk_masks(scores, 0.5, allocation, power=0.0, minimum=minimum)
        kept[minimum] = int(masks['b'].sum())
        assert masks['b'][-kept[minimum] :].all()
        assert masks['a'].sum() + kept[minimum] == 10
    assert kept[0.0] <= 6 and kept[0.5] == max(kept[0.0], 4) and kept[1.0] == 8


def test_lamp_by_hand():
    # 1 / (1 + 4 + 9), 4 / (4 + 9), 9 / 9: the largest of a layer has the score 1.
    np.testing.assert_allclose(lamp(jnp.array([1.0, 3.0, 2.0]), 3), [1 / 14, 1, 4 / 13], rtol=1e-6)
    np.testing.assert_allclose(lamp(jnp.array([1.0, 3.0, 2.0]), 2), [0, 1, 4 / 13], rtol=1e-6)
    scores = {'a': jnp.array([1.0, 3.0, 2.0]), 'b': jnp.array([0.01, 0.02])}
    masks = topk_masks(scores, 3 / 5, 'lamp')  # 1/14, 1, 4/13 and 1/5, 1
    np.testing.assert_array_equal(masks['a'], [0, 1, 1])
    np.testing.assert_array_equal(masks['b'], [0, 1])


@pytest.mark.parametrize('allocation', ALLOCATIONS)
@pytest.mark.parametrize('values', ['distinct', 'few', 'zero'])
def test_budgets_and_classes_hold_for_any_scores(allocation, values):
    rng = np.random.default_rng(0)
    scores = scores_of(rng, a=(3, 3, 4, 8), b=(70, 30), head=(30, 10))
    if values != 'distinct':
        scores = jax.tree.map(lambda x: jnp.round(x) * (values == 'few'), scores)
    size = sum(leaf.size for leaf in scores.values())
    for density in (0.01, 0.1):
        masks = topk_masks(scores, density, allocation, head=('head',), per_class=1)
        kept = sum(int(mask.sum()) for mask in masks.values())
        sums = sum(kept_count(leaf.size, density) for leaf in scores.values())
        assert kept == (sums if allocation == 'uniform' else kept_count(size, density))
        assert all(mask.any() for mask in masks.values())
        if masks['head'].sum() >= 10:
            assert masks['head'].any(axis=0).all()
        for name, mask in masks.items():
            if name != 'head':
                magnitudes, chosen = np.abs(scores[name]), np.asarray(mask, bool)
                assert magnitudes[chosen].min() >= magnitudes[~chosen].max()


def test_each_class_keeps_its_own_largest_weights():
    scores = {'head': jnp.array([[9.0, 0.1], [8.0, 0.3], [7.0, 0.2], [6.0, 0.0]])}
    masks = topk_masks(scores, 0.5, head=('head',), per_class=2)
    np.testing.assert_array_equal(masks['head'], [[1, 0], [1, 1], [0, 1], [0, 0]])
    masks = topk_masks(scores, 0.5, head=('head',))
    np.testing.assert_array_equal(masks['head'], [[1, 0], [1, 0], [1, 0], [1, 0]])


def test_two_of_four():
    scores = {'a': jnp.array([[1.0, 5.0], [-2.0, 5.0], [3.0, 5.0], [0.0, 5.0]] * 2)}
    masks = topk_masks(scores, 0.5, structure='n_of_m')
    np.testing.assert_array_equal(masks['a'], [[0, 1], [1, 1], [1, 0], [0, 0]] * 2)
    conv = jax.random.normal(jax.random.key(0), (3, 3, 8, 5))
    mask = topk_masks({'a': conv}, 0.25, structure='n_of_m', n=1, m=4)['a']
    kept = np.asarray(mask).reshape(3, 3, 2, 4, 5)
    assert (kept.sum(axis=3) == 1).all()
    largest = np.abs(conv).reshape(3, 3, 2, 4, 5).argmax(axis=3)
    np.testing.assert_array_equal(kept.argmax(axis=3), largest)


def test_inputs_that_do_not_divide_are_refused_by_name():
    scores = {'conv1': {'kernel': jnp.ones((3, 3, 3, 8))}}
    with pytest.raises(ValueError, match='conv1/kernel has 3 inputs, which 4 does not divide'):
        topk_masks(scores, 0.5, structure='n_of_m')
    masks = topk_masks(scores, 0.5, structure='n_of_m', undivided='dense')
    assert masks['conv1']['kernel'].all()
