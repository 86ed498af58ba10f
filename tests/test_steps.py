"""One SGD step of every phase and objective, against values recorded from the original."""

import json

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden import DATA, formula_images, formula_labels, formula_noise, formula_state_dict

from conversion import import_state_dict, names
from robustprune_jax.config import default
from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.masks import init_scores
from robustprune_jax.models import create_model
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.optim import optimizer, phase_labels, trainable
from robustprune_jax.sharding import make_mesh
from robustprune_jax.step import create_state, train_step

RECORDED = json.loads((DATA / 'steps.json').read_text())
SHAPE = (8, 3, 32, 32)


def recording() -> optax.GradientTransformation:
    """Keeps the gradients that the optimizer was given as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(np.zeros_like, params),
        lambda gradients, state, params=None: (gradients, gradients),
    )


def one_step(arch, phase, trainer):
    """Returns loss, {path: gradient} and {path: update} of one step, as the reference took it."""
    config = default()
    config.attack.update(eps=0.031, step_size=0.0078, steps=10)
    if trainer == 'trades_l2':
        config.attack.update(eps=0.5, step_size=2 * 0.5 / 10, norm='l2')
    section = config[phase]
    section.update(learning_rate=0.1, schedule='constant')
    variables = import_state_dict(
        formula_state_dict(arch, 'subnet'), arch, density=1.0 if phase == 'pretrain' else 0.1
    )
    variables.pop('unused', None)
    if phase == 'pretrain':
        del variables['scores'], variables['masks']
    if phase == 'prune':
        del variables['masks']
        variables['scores'] = init_scores(variables['params'], 'scaled')
    objective = OBJECTIVES[{'base': 'natural', 'trades_l2': 'trades'}.get(trainer, trainer)](config)
    tx = optax.chain(recording(), optimizer(section, phase_labels(variables, phase), 1))
    update = train_step(
        create_model(arch),
        objective,
        tx,
        AUGMENTATIONS['none'],
        make_mesh(),
        steps_per_epoch=1,
        total_steps=1,
        density=0.1 if phase == 'prune' else None,
    )
    batch = {
        'image': formula_images(SHAPE),
        'label': formula_labels(SHAPE[0]),
        'noise': formula_noise(SHAPE),
    }
    before = flatten_dict(jax.tree.map(np.array, trainable(variables)), sep='/')
    state = create_state(variables, tx, objective, batch['image'].shape)
    state, metrics = update(state, batch, jax.random.key(0))
    after = flatten_dict(trainable(state.variables), sep='/')
    gradients = flatten_dict(state.optimizer[0], sep='/')
    updates = {path: np.asarray(after[path]) - before[path] for path in before}
    return float(metrics['loss']), gradients, updates


@pytest.mark.parametrize('case', RECORDED)
def test_one_step_equals_the_original(case):
    arch, phase, trainer = case.split('/')
    recorded = RECORDED[case]
    loss, gradients, updates = one_step(arch, phase, trainer)
    attacked = trainer.startswith('trades')
    assert loss == pytest.approx(recorded['loss'], rel=1e-3 if attacked else 1e-4)
    paths = {leaf.torch: f'{leaf.collection}/{leaf.path}' for leaf in names.leaves(arch, True)}
    # Beside a whole network's gradient, one tensor's rounding has a floor.
    for kind, values, tolerance in (
        ('grad_norm', gradients, 1e-2 if attacked else 1e-4),
        ('update_norm', updates, 1e-3),
    ):
        for name, norm in recorded[kind].items():
            if paths[name] not in values:
                assert norm == 0, name
                continue
            ours = float(np.linalg.norm(np.asarray(values[paths[name]], np.float64)))
            assert ours == pytest.approx(norm, rel=tolerance, abs=1e-7), (kind, name)
