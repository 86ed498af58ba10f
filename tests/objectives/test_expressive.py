"""Expressive losses, SABR, and the penalties beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax import pipeline
from robustprune_jax.attacks import cross_entropy, pgd
from robustprune_jax.bounds import margins
from robustprune_jax.config import default
from robustprune_jax.objectives import OBJECTIVES, Objective, Progress, penalties
from robustprune_jax.runtime.files import read_jsonl

EPS = 0.05
KEY = jax.random.key(0)


def network(weights, images):
    x = jax.nn.relu(images.reshape(len(images), -1) @ weights[0])
    return jax.nn.relu(x @ weights[1] - 0.1) @ weights[2]


def logits_of(weights, images, train=False, batch_stats=None):
    return network(weights, images), None


KEYS = jax.random.split(KEY, 4)
WEIGHTS = [
    0.7 * jax.random.normal(key, shape)
    for key, shape in zip(KEYS, ((12, 16), (16, 8), (8, 4)), strict=False)
]
IMAGES, LABELS = jax.random.uniform(KEYS[3], (6, 2, 2, 3)), jnp.arange(6) % 4
BATCH = {'image': IMAGES, 'label': LABELS}
RISEN = Progress(jnp.asarray(100), 10, 2000, 0.0)  # at full eps


def loss_of(name, progress=RISEN, certified=(), **settings):
    config = default()
    config.certified.update(eps=EPS, **dict(certified))
    config[name].update(settings)
    objective = OBJECTIVES[name](config)

    @jax.jit
    def loss(weights):
        whole = Partial(logits_of, weights)
        batch = objective.inner(whole, BATCH, KEY, progress)
        return objective.loss(whole, (), batch, KEY, progress)

    value, (_, _, metrics) = loss(WEIGHTS)
    return float(value), metrics


@pytest.fixture(scope='module')
def parts():
    """Each image's cross-entropy of the worst case and under the attack, and what they are of."""
    f = Partial(network, WEIGHTS)
    lower = margins(f, IMAGES, LABELS, eps=EPS, method='ibp')
    attacked = f(pgd(f, KEY, IMAGES, LABELS, eps=EPS, step_size=10 * EPS, steps=1))
    return cross_entropy(-lower, LABELS), cross_entropy(attacked, LABELS), lower, attacked


@pytest.mark.parametrize('name', ['mtl_ibp', 'cc_ibp', 'exp_ibp'])
def test_expressive_losses_go_from_the_attack_to_the_bounds(parts, name):
    worst, reached, _, attacked = parts
    assert loss_of(name, alpha=0.0)[0] == pytest.approx(float(reached.mean()), rel=1e-5)
    bounds, metrics = loss_of(name, alpha=1.0)
    assert bounds == pytest.approx(float(worst.mean()), rel=1e-5)
    assert bounds == pytest.approx(loss_of('ibp', kappa_end=0.0)[0], rel=1e-5)
    assert float(metrics['eps']) == pytest.approx(EPS)
    right = jnp.mean(jnp.argmax(attacked, axis=1) == LABELS)
    assert float(metrics['robust_accuracy']) == float(right)


def test_expressive_losses_in_between(parts):
    worst, reached, lower, attacked = parts
    own = jnp.take_along_axis(attacked, LABELS[:, None], axis=1)
    mixed = 0.3 * lower + 0.7 * (own - attacked)  # margins
    for name, expected in {
        'mtl_ibp': 0.3 * worst + 0.7 * reached,
        'cc_ibp': jnp.log(jnp.sum(jnp.exp(-mixed), axis=1)),
        'exp_ibp': worst**0.3 * reached**0.7,
    }.items():
        value = loss_of(name, alpha=0.3)[0]
        assert value == pytest.approx(float(expected.mean()), rel=1e-5)
        assert reached.mean() < value < worst.mean()


def test_the_two_radii_have_their_factors():
    f = Partial(network, WEIGHTS)
    attack = {'factor_a': 2.0, 'steps': 3, 'step_size': 0.25}
    found = loss_of('mtl_ibp', certified=attack, alpha=0.0)[0]
    moved = pgd(f, KEY, IMAGES, LABELS, eps=2 * EPS, step_size=0.5 * EPS, steps=3)
    assert found == pytest.approx(float(cross_entropy(f(moved), LABELS).mean()), rel=1e-5)
    found = loss_of('mtl_ibp', certified={'factor_t': 1.5}, alpha=1.0)[0]
    lower = margins(f, IMAGES, LABELS, eps=1.5 * EPS, method='ibp')
    assert found == pytest.approx(float(cross_entropy(-lower, LABELS).mean()), rel=1e-5)


def test_exp_ibp_has_gradients_where_a_loss_rounds_to_0():
    objective = OBJECTIVES['exp_ibp'](default())
    sure = Partial(lambda scale, x, train=False, batch_stats=None: (x[:, 0, :2, 0] * scale, None))
    batch = {'image': jnp.tile(jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1), (3, 1, 1, 1))}
    batch['label'] = jnp.zeros(3, int)

    def loss(scale):
        bound = Partial(sure.func, scale)
        attacked = objective.inner(bound, batch, KEY, RISEN)
        return objective.loss(bound, (), attacked, KEY, RISEN)[0]

    value, gradient = jax.value_and_grad(loss)(200.0)
    assert 0 < value < 1e-6
    assert np.isfinite(gradient)


def test_sabr_goes_from_the_attacked_point_to_the_ball(parts):
    worst, reached, *_ = parts
    whole, metrics = loss_of('sabr', part=1.0)
    assert whole == pytest.approx(float(worst.mean()), rel=1e-5)
    assert loss_of('sabr', part=0.0)[0] == pytest.approx(float(reached.mean()), rel=1e-5)
    assert set(metrics) == {'accuracy', 'box_verified_accuracy', 'eps'}


def test_sabrs_box_lies_within_the_ball():
    f = Partial(network, WEIGHTS)
    moved = pgd(f, KEY, IMAGES, LABELS, eps=EPS, step_size=10 * EPS, steps=1)
    tau = 0.3 * EPS
    center = jnp.clip(moved, IMAGES - EPS + tau, IMAGES + EPS - tau)
    lower = margins(f, center, LABELS, eps=tau, method='ibp')
    expected = float(cross_entropy(-lower, LABELS).mean())
    assert loss_of('sabr', part=0.3)[0] == pytest.approx(expected, rel=1e-5)


LAYERS = [
    (jnp.array([[1.0, -3.0], [-1.0, -2.0]]), jnp.array([[3.0, -1.0], [2.0, 0.0]])),
    (jnp.array([[0.5], [0.25]]), jnp.array([[0.75], [0.75]])),
]


def test_penalties_by_hand():
    # l u of the six inputs: 3, 3, -2, 0 (never negative: u = 0) and 0.375, 0.1875.
    products = np.array([3, 3, -2, 0, 0.375, 0.1875])
    expected = -np.tanh(1 + products).mean()
    assert float(penalties.instability(LAYERS)) == pytest.approx(expected, rel=1e-6)
    # Mean radii 1.125 and 0.1875 of an input's 0.125: ratios 1/9 and 2/3, above tau.
    expected = np.mean([(0.5 - 1 / 9) / 0.5, 0])
    assert float(penalties.tightness(LAYERS, 0.125)) == pytest.approx(expected, rel=1e-6)
    # Centers 2, -2, 0.5, -1, mean -0.125. Active: 2; inactive: -2 alone, as -1 has u = 0.
    squares = np.array([2.125**2, 1.875**2])
    first = max(0.5 - squares.min() / squares.max(), 0) / 0.5
    # The second layer's are all active: nothing to balance them.
    assert float(penalties.balance(LAYERS)) == pytest.approx((first + 2) / 2, rel=1e-6)


def test_penalties_of_a_network():
    f = Partial(network, WEIGHTS)
    layers = penalties.relu_inputs(f, IMAGES, EPS)
    flat = IMAGES.reshape(6, -1)
    low, high = jnp.maximum(flat - EPS, 0), jnp.minimum(flat + EPS, 1)
    plus, minus = jnp.maximum(WEIGHTS[0], 0), jnp.minimum(WEIGHTS[0], 0)
    np.testing.assert_allclose(layers[0][0], low @ plus + high @ minus, atol=1e-5)
    np.testing.assert_allclose(layers[0][1], high @ plus + low @ minus, atol=1e-5)
    assert [layer[0].shape for layer in layers] == [(6, 16), (6, 8)]
    radius = float(penalties.box_radius(IMAGES, EPS))
    assert radius == pytest.approx(float(jnp.mean(high - low)) / 2, rel=1e-5)
    everything = float(penalties.absolute_weights(f))
    assert everything == pytest.approx(sum(float(abs(w).sum()) for w in WEIGHTS), rel=1e-5)
    with pytest.raises(ValueError, match='no relu'):
        penalties.relu_inputs(Partial(lambda x: x.reshape(len(x), -1)), IMAGES, EPS)


def constant(logits_of, carry, batch, key, progress):
    return jnp.asarray(10.0), (carry, None, {})


def test_a_phase_adds_its_penalties():
    section, certified = default().finetune, default().certified
    certified.eps = EPS
    nothing = Objective(constant)
    assert penalties.penalised(nothing, section, certified) is nothing

    def added(step, ramp_epochs, **weights):
        section = default().finetune
        section.update(weights)
        objective = penalties.penalised(nothing, section, certified)
        progress = Progress(jnp.asarray(step), 10, 2000, ramp_epochs)
        whole = Partial(logits_of, WEIGHTS)
        return float(objective.loss(whole, (), BATCH, KEY, progress)[0]) - 10

    f = Partial(network, WEIGHTS)
    half, full = (penalties.relu_inputs(f, IMAGES, eps) for eps in (EPS / 2, EPS))
    expected = 0.01 * float(penalties.absolute_weights(f))
    assert added(0, 0.0, l1=0.01) == pytest.approx(expected, rel=1e-4)
    expected = float(penalties.instability(full))
    assert added(0, 0.0, nrs=1.0) == pytest.approx(expected, abs=1e-5)
    radius = penalties.box_radius(IMAGES, EPS / 2)
    warm_up = 3 * penalties.tightness(half, radius) + 2 * penalties.balance(half)
    assert float(warm_up) > 0.1
    settings = {'l_tight': 3.0, 'l_relu': 2.0}
    assert added(50, 10.0, **settings) == pytest.approx(0.5 * float(warm_up), abs=1e-5)
    assert added(100, 10.0, **settings) == added(0, 0.0, **settings) == 0
    expected = float(penalties.instability(half)) + 0.5 * float(warm_up)
    assert added(50, 10.0, nrs=1.0, **settings) == pytest.approx(expected, abs=1e-5)


def test_all_phases_train_and_verify(tiny_config, tmp_path):
    config = tiny_config()
    config.pretrain.objective, config.prune.objective = 'mtl_ibp', 'sabr'
    config.finetune.objective = 'exp_ibp'
    config.densities = (0.5,)
    config.methods = 'hydra'
    config.phases = 'pretrain,prune,finetune,evaluate'
    config.certified.eps = config.evaluate.pgd.eps = 0.02
    config.evaluate.certified.methods = 'ibp,crown_ibp'
    for phase in ('pretrain', 'prune', 'finetune'):
        config[phase].update(optimizer='adam', learning_rate=2e-3, l1=1e-6)
    config.pretrain.update(epochs=8, ramp_epochs=4.0, l_tight=0.5, l_relu=0.5)
    config.pretrain.update(schedule='milestones', milestones=(6.0, 7.0))
    config.prune.nrs = config.finetune.nrs = 1e-3
    result = pipeline.run(config, tmp_path / 'run')
    assert {n['name'] for n in result['networks']} == {'pretrain', 'hydra_0.5'}
    assert result['networks'][0]['robust']['crown_ibp']['accuracy'] > 0.3
    metrics = read_jsonl(tmp_path / 'run' / 'pretrain' / 'metrics.jsonl')
    assert metrics[0]['eps'] < metrics[-1]['eps'] == pytest.approx(0.02)
    assert metrics[-1]['learning_rate'] == pytest.approx(2e-3 * 0.2**2)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('mtl_ibp.alpha', 1.5, 'config.mtl_ibp.alpha is 1.5: expected a part'),
        ('sabr.part', -0.1, 'config.sabr.part is -0.1'),
        ('certified.factor_t', 0.0, 'config.certified.factor_t is 0.0'),
        ('certified.validate_by', 'crwn', "'crwn': did you mean 'crown'"),
        ('finetune.nrs', -1.0, 'config.finetune.nrs is -1.0'),
        ('pretrain.milestones', (60.0, 50.0), 'config.pretrain.milestones is .*later'),
    ],
)
def test_bad_settings_are_found_before_training(tiny_config, tmp_path, field, value, message):
    config = tiny_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        pipeline.run(config, tmp_path / 'run')
