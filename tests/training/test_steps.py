"""One SGD step of every phase and objective, against values recorded from the original.

steps.json was recorded in float32, where an attack amplifies rounding: sign steps flip single
pixels, and a ReLU that flips changes every gradient before it, so that the original's own float32
and float64 runs differ by up to 10 % in a tensor's gradient norm. steps_float64.json is the
original's code in float64, where nothing is amplified.
"""

import json

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden import DATA, formula_images, formula_labels, formula_noise, formula_state_dict
from stepping import compiled_step, phase_optimizer

from conversion import import_state_dict, names
from robustprune_jax.config import default
from robustprune_jax.models import create_model
from robustprune_jax.pruning import init_scores
from robustprune_jax.runtime import compiler
from robustprune_jax.training.optim import trainable

RECORDED = json.loads((DATA / 'steps.json').read_text())
RECORDED_FLOAT64 = json.loads((DATA / 'steps_float64.json').read_text())
SHAPE = (8, 3, 32, 32)


def recording() -> optax.GradientTransformation:
    """Keeps the gradients that the optimizer was given as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(np.zeros_like, params),
        lambda gradients, state, params=None: (gradients, gradients),
    )


def one_step(arch, phase, trainer, dtype):
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
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    if phase == 'pretrain':
        del variables['scores'], variables['masks']
    if phase == 'prune':
        del variables['masks']
        variables['scores'] = init_scores(variables['params'], 'scaled')
    tx = optax.chain(recording(), phase_optimizer(config, phase, variables))
    batch = {
        'image': formula_images(SHAPE).astype(dtype),
        'label': formula_labels(SHAPE[0]),
        'noise': formula_noise(SHAPE).astype(dtype),
    }
    before = flatten_dict(jax.tree.map(np.array, trainable(variables)), sep='/')
    objective = {'base': 'natural', 'trades_l2': 'trades'}.get(trainer, trainer)
    density = 0.1 if phase == 'prune' else None
    update, state = compiled_step(
        create_model(arch), variables, batch['image'].shape, config, objective, tx, density=density
    )
    state, metrics = update(state, batch, jax.random.key(0))
    after = flatten_dict(trainable(state.variables), sep='/')
    gradients = flatten_dict(state.optimizer[0], sep='/')
    updates = {path: np.asarray(after[path]) - before[path] for path in before}
    return float(metrics['loss']), gradients, updates


def compare(case, recorded, dtype, loss_tolerance, gradient_tolerance, update_tolerance):
    arch, phase, trainer = case.split('/')
    loss, gradients, updates = one_step(arch, phase, trainer, dtype)
    assert loss == pytest.approx(recorded['loss'], rel=loss_tolerance)
    paths = {leaf.torch: f'{leaf.collection}/{leaf.path}' for leaf in names.leaves(arch, True)}
    for kind, values, tolerance in (
        ('grad_norm', gradients, gradient_tolerance),
        ('update_norm', updates, update_tolerance),
    ):
        for name, norm in recorded[kind].items():
            if paths[name] not in values:
                assert norm == 0, name
                continue
            ours = float(np.linalg.norm(np.asarray(values[paths[name]], np.float64)))
            assert ours == pytest.approx(norm, rel=tolerance, abs=1e-12), (kind, name)


PLAIN = [case for case in RECORDED if case.startswith('cifar_model/')]
WITH_BATCH_NORM = [case for case in RECORDED if case not in PLAIN]


def nightly(cases, *others):
    """Marks all of the cases but the others, which run by default."""
    return [
        case if case.endswith(others) else pytest.param(case, marks=pytest.mark.nightly)
        for case in cases
    ]


def compare_in_float64(case):
    # torch.renorm, which projects in l_2, scales to just below eps: by 1e-7 / norm.
    loss, norms = (1e-7, 1e-6) if case.endswith('trades_l2') else (1e-9, 1e-7)
    with jax.enable_x64(True):
        compare(case, RECORDED_FLOAT64[case], np.float64, loss, norms, norms)


@pytest.mark.parametrize('case', PLAIN)
def test_one_step_equals_the_original(case):
    compare_in_float64(case)


@pytest.mark.optimised
@pytest.mark.parametrize(
    'case',
    nightly(
        WITH_BATCH_NORM,
        'pretrain/base',
        'vgg4_bn/prune/trades',
        'vgg4_bn/finetune/base',
    ),
)
def test_one_step_with_batch_norm_equals_the_original(case):
    with compiler.platform('gpu'):  # whose attacks are loops: ten times less to compile
        compare_in_float64(case)


@pytest.mark.parametrize(
    'case', nightly(PLAIN, 'pretrain/base', 'prune/trades', 'prune/smooth', 'finetune/trades_l2')
)
def test_one_step_in_float32(case):
    attacked = 'trades' in case
    loss_tolerance = 1e-3 if attacked else 1e-4
    gradient_tolerance = 5e-2 if attacked else 1e-4
    update_tolerance = 5e-2 if attacked else 1e-3
    compare(case, RECORDED[case], np.float32, loss_tolerance, gradient_tolerance, update_tolerance)
