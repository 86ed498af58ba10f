"""Kept fractions that train (HARP)."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustprune_jax import pipeline
from robustprune_jax.pruning import (
    Budget,
    Choice,
    Rates,
    choose_masks,
    kept_count,
    training_masks,
)
from robustprune_jax.pruning.rates import after_step, excess, fractions, init_rates, penalty
from robustprune_jax.training import checkpoint

BUDGET = Budget(0.25, minimum=0.1)


def variables_of(rates, **sizes):
    rng = np.random.default_rng(0)
    scores = {
        name: jnp.array(rng.standard_normal(size), jnp.float32) for name, size in sizes.items()
    }
    return {'scores': scores, **init_rates(scores, BUDGET, rates)}


def test_fractions_start_at_an_allocation_on_budget():
    for start in ('uniform', 'erk', 'power'):
        rates = Rates(start=start)
        variables = variables_of(rates, a=(100,), b=(20, 50))
        parts = fractions(variables, BUDGET)
        kept = sum(parts[name,] * leaf.size for name, leaf in variables['scores'].items())
        assert float(kept) == pytest.approx(275, rel=1e-3)
        assert abs(float(excess(variables, BUDGET))) < 1e-3


@pytest.mark.parametrize('gradient', ['threshold', 'sum'])
def test_a_fraction_s_gradient_by_hand(gradient):
    """g = dL/dmask is 1, 2, ... 8 by rank; k = 0.25 keeps 2 of 8."""
    rates = Rates(gradient=gradient)
    scores = {'a': jnp.array([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, -1.0])}
    worth = jnp.arange(1.0, 9)
    variables = {'scores': scores, **init_rates(scores, BUDGET, rates)}

    def loss(trained):
        masks = training_masks(Choice(BUDGET, rates=rates), {**variables, **trained})
        return jnp.sum(worth * masks['a'])

    trained = {name: variables[name] for name in ('scores', 'rates')}
    value, found = jax.value_and_grad(loss)(trained)
    assert value == 1 + 2
    np.testing.assert_array_equal(found['scores']['a'], worth * np.sign(scores['a']))
    # Ranks 2 to 4 lie between k / 2 and 2 k, their mean is 3; the sum over all is 36.
    of_fraction = 8 * 3 if gradient == 'threshold' else 36
    chain = jax.grad(lambda r: fractions({'rates': r}, BUDGET)['a',])(variables['rates'])
    assert float(found['rates']['a']) == pytest.approx(of_fraction * float(chain['a']), rel=1e-5)


def test_the_penalty_s_gradient_is_its_finite_difference():
    rates = Rates(gamma=0.3)
    variables = variables_of(rates, a=(100,), b=(20, 50))
    variables['rates'] = jax.tree.map(lambda rate: rate + 0.7, variables['rates'])

    def of(rate):
        return penalty({**variables, 'rates': {**variables['rates'], 'b': rate}}, BUDGET)

    at = variables['rates']['b']
    difference = (of(at + 0.01) - of(at - 0.01)) / 0.02
    assert float(jax.grad(of)(at)) == pytest.approx(float(difference), rel=1e-3)
    assert float(of(at)) == pytest.approx(0.3 * float(excess(variables, BUDGET)))
    variables['rates'] = jax.tree.map(lambda rate: rate - 2, variables['rates'])
    assert float(of(variables['rates']['b'])) == 0  # within the budget nothing is lost


def test_gamma_grows_until_an_epoch_ends_within_the_budget():
    rates = Rates()
    variables = variables_of(rates, a=(100,))
    over = {**variables, 'rates': {'a': variables['rates']['a'] + 1}}
    under = {**variables, 'rates': {'a': variables['rates']['a'] - 1}}
    gammas = []
    for rated, ends in ((over, False), (over, True), (under, False), (over, True), (under, True)):
        now = after_step({**rated, 'budget': variables['budget']}, BUDGET, rates, jnp.bool_(ends))
        variables['budget'] = now['budget']
        gammas.append(float(now['budget']['gamma']))
    assert gammas == pytest.approx([0.2, 0.4, 0.4, 0.6, 0.6])
    now = after_step({**over, 'budget': variables['budget']}, BUDGET, rates, jnp.bool_(True))
    assert float(now['budget']['gamma']) == pytest.approx(0.6)  # it was met: no more


@pytest.mark.parametrize('shift', [-3.0, 0.0, 4.0])
def test_saved_masks_keep_the_budget_exactly(shift):
    rates, budget = Rates(), Budget(0.25, head=('c',), per_class=1, minimum=0.1)
    variables = variables_of(rates, a=(101,), b=(20, 50), c=(7, 3))
    rng = np.random.default_rng(1)
    variables['rates'] = jax.tree.map(
        lambda rate: rate + shift + jnp.float32(rng.standard_normal()), variables['rates']
    )
    masks = choose_masks(Choice(budget, 'learned', rates=rates), variables)
    assert sum(int(mask.sum()) for mask in masks.values()) == 1122 - int(0.75 * 1122)
    assert masks['c'].any(axis=0).all()


def test_rates_train_and_go_on_where_they_stopped(tiny_config, finished, tmp_path):
    config = tiny_config()
    config.phases, config.methods, config.densities = 'prune', 'harp', (0.1,)
    config.source = str(finished[0] / 'pretrain')
    pipeline.run(config, tmp_path)
    folder = tmp_path / 'density_0.1/harp/prune'
    whole, meta = checkpoint.load(folder)
    kept = {name: int(layer['kernel'].sum()) for name, layer in whole['masks'].items()}
    sizes = {name: layer['kernel'].size for name, layer in whole['masks'].items()}
    assert sum(kept.values()) == kept_count(sum(sizes.values()), 0.1)
    assert kept != {name: kept_count(size, 0.1) for name, size in sizes.items()}
    assert meta['allocation'] == 'learned'
    shutil.rmtree(folder / f'checkpoints/{meta["step"]}')
    pipeline.run(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(folder)[0], whole)
