import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden import DATA

from robustprune_jax.config import default
from robustprune_jax.training.optim import optimizer, phase_labels, schedule, trainable

RECORDED = json.loads((DATA / 'schedules.json').read_text())


def section(**fields):
    section = default().pretrain
    section.update(fields)
    return section


@pytest.mark.parametrize(('name', 'recorded'), [('original_cosine', 'cosine'), ('step', 'step')])
def test_schedules_of_the_original(name, recorded):
    rate = schedule(section(schedule=name, epochs=100, learning_rate=0.1), steps_per_epoch=7)
    for epoch, expected in enumerate(RECORDED[recorded]):
        for step in (7 * epoch, 7 * epoch + 6):
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5)


def test_cosine_with_warm_up():
    rate = schedule(section(epochs=12, learning_rate=0.4, warmup_epochs=2.0), steps_per_epoch=5)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.2, 0.4], atol=1e-7)
    np.testing.assert_allclose([rate(35), rate(60)], [0.2, 0], atol=1e-7)


VARIABLES = {
    'params': {
        'conv': {'kernel': jnp.ones((1, 1, 2, 2)), 'bias': jnp.ones(2)},
        'bn': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
        'ln': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
    },
    'batch_stats': {'bn': {'mean': jnp.zeros(2), 'var': jnp.ones(2)}},
    'scores': {'conv': {'kernel': jnp.ones((1, 1, 2, 2))}},
}


@pytest.mark.parametrize(
    ('phase', 'freeze_bn', 'trains'),
    [
        ('prune', False, {'scores/conv/kernel', 'params/bn/scale', 'params/bn/bias'}),
        ('prune', True, {'scores/conv/kernel'}),
        (
            'finetune',
            False,
            {f'params/{path}' for path in flatten_dict(VARIABLES['params'], sep='/')},
        ),
    ],
)
def test_who_trains(phase, freeze_bn, trains):
    """Frozen leaves neither move nor decay, whatever their gradient."""
    labels = phase_labels(VARIABLES, phase, freeze_bn)
    tx = optimizer(section(schedule='constant', weight_decay=0.5, learning_rate=0.1), labels, 1)
    leaves = trainable(VARIABLES)
    updates, _ = tx.update(leaves, tx.init(leaves), leaves)
    moved = flatten_dict(updates, sep='/')
    assert {path for path, update in moved.items() if jnp.any(update != 0)} == trains
    for path in trains:  # gradient 1, weight 1, decay 0.5
        np.testing.assert_allclose(moved[path], -0.15, rtol=1e-6)


def torch_steps(name, gradients, rate):
    torch = pytest.importorskip('torch')
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    tx = {
        'sgd': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        'adam': lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
        'rmsprop': lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    }[name]([weight])
    for step, gradient in enumerate(gradients):
        tx.param_groups[0]['lr'] = float(rate(step))
        weight.grad = torch.tensor(gradient)
        tx.step()
    return weight.detach().numpy()


@pytest.mark.parametrize('name', ['sgd', 'adam', 'rmsprop'])
def test_optimizers_step_as_torchs_do(name):
    settings = section(optimizer=name, weight_decay=0.01, learning_rate=0.1, epochs=4)
    variables = {'params': {'w': jnp.array([1.0, -2.0])}}
    tx = optimizer(settings, phase_labels(variables, 'pretrain'), 1)
    leaves = trainable(variables)
    state = tx.init(leaves)
    gradients = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    for gradient in gradients:
        updates, state = tx.update({'params': {'w': jnp.array(gradient)}}, state, leaves)
        leaves = optax.apply_updates(leaves, updates)
    expected = torch_steps(name, gradients, schedule(settings, 1))
    np.testing.assert_allclose(leaves['params']['w'], expected, rtol=1e-5)
