"""Gradients at perturbed weights (AWP) and scores (S2AP), and with a teacher, in float64 against
steps by hand."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from networks import Banded
from runs import assert_same, weights
from stepping import compiled_step

from robustprune_jax import pipeline
from robustprune_jax.attacks import cross_entropy, pgd
from robustprune_jax.config import default
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.objectives.distillation import distilled
from robustprune_jax.objectives.trades import START_NOISE
from robustprune_jax.pruning.perturb import Perturbation, perturb
from robustprune_jax.rules import check
from robustprune_jax.training import checkpoint

RATE = 0.1
KERNEL = np.array([[0.5, -0.2], [0.3, 0.4], [-0.6, 0.1]])
IMAGES = np.array([[0, 0.5, 1], [0.2, 0.95, 0], [0.4, 0.1, 0.7]])
LABELS = np.array([0, 1, 1])
TEACHER = np.array([[1.0, -1.0], [0.2, 0.1], [-0.4, 0.9]])
BATCH = {'image': IMAGES.reshape(3, 1, 3, 1), 'label': LABELS}


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(2, use_bias=False, name='dense')(images.reshape(len(images), -1))


def stepped(variables, gamma, space='weights', warmup_epochs=0.0, steps=1, **settings):
    """Returns the collections after so many epochs of one step of SGD on cross-entropy."""
    perturbation = gamma and Perturbation(gamma, warmup_epochs, space)
    with jax.enable_x64(True):
        update, state = compiled_step(
            Linear(),
            variables,
            BATCH['image'].shape,
            default(),
            'natural',
            optax.sgd(RATE),
            perturbation=perturbation,
            **settings,
        )
        for _ in range(steps):
            state, _ = update(state, BATCH, jax.random.key(0))
    return {name: np.asarray(of['dense']['kernel']) for name, of in state.variables.items()}


def softmax(logits):
    odds = np.exp(logits)
    return odds / odds.sum(1, keepdims=True)


def slope(kernel):
    """The gradient of the mean cross-entropy."""
    return IMAGES.T @ (softmax(IMAGES @ kernel) - np.eye(2)[LABELS]) / 3


def as_kernel(leaf):
    return {'dense': {'kernel': leaf}}


def test_a_perturbation_has_gamma_times_the_length_of_its_layer():
    tree = {'a': jnp.array([[3.0, 4.0]]), 'b': jnp.array([1.0, 0.0])}
    gradient = {'a': jnp.array([[0.0, -2.0]]), 'b': jnp.zeros(2)}
    found = perturb(tree, gradient, 0.1)
    np.testing.assert_allclose(found['a'], [[0, -0.5]], rtol=1e-6)
    np.testing.assert_array_equal(found['b'], 0)


def test_weights_step_by_the_gradient_at_perturbed_weights_of_the_mask():
    mask = np.array([[1.0, 0], [1, 1], [0, 1]])
    variables = {'params': as_kernel(KERNEL), 'masks': as_kernel(mask)}
    masked, gradient = KERNEL * mask, slope(KERNEL * mask) * mask
    nu = 0.3 * np.linalg.norm(masked) * gradient / np.linalg.norm(gradient)
    expected = KERNEL - RATE * slope(masked + nu) * mask
    found = stepped(variables, 0.3)['params']
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found == KERNEL)[mask == 0].all()


def test_scores_step_by_the_gradient_at_perturbed_scores_and_their_masks():
    scores = np.array([[0.5, -0.45], [0.3, -0.46], [0.44, 0.1]])
    variables = {'params': as_kernel(KERNEL), 'scores': as_kernel(scores)}

    def score_slope(scores):
        kept = np.abs(scores) >= np.sort(np.abs(scores).ravel())[3]  # three of six
        return slope(KERNEL * kept) * KERNEL * np.sign(scores), kept

    gradient, kept = score_slope(scores)
    nu = 0.3 * np.linalg.norm(scores) * gradient / np.linalg.norm(gradient)
    at_worst, then_kept = score_slope(scores + nu)
    assert (kept != then_kept).any()
    found = stepped(variables, 0.3, 'scores', density=0.5)
    np.testing.assert_allclose(found['scores'], scores - RATE * at_worst, rtol=1e-12)


def test_a_warm_up_comes_before_the_perturbation():
    variables = {'params': as_kernel(KERNEL)}
    plain, late, early = (
        [stepped(variables, *settings, steps=steps)['params'] for steps in (1, 2)]
        for settings in ((0.0,), (0.3, 'weights', 1.0), (0.3,))
    )
    np.testing.assert_allclose(late[0], plain[0], rtol=1e-12)
    gradient = slope(plain[0])
    nu = 0.3 * np.linalg.norm(plain[0]) * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(late[1], plain[0] - RATE * slope(plain[0] + nu), rtol=1e-12)
    assert abs(early[0] - plain[0]).max() > 1e-3


def test_parts_of_a_batch_have_the_perturbation_of_the_whole():
    variables = {'params': as_kernel(KERNEL)}
    whole, parts = (stepped(variables, 0.3, accumulate=parts)['params'] for parts in (1, 3))
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def trades_by_hand(module, variables, batch, config, key, gamma):
    """Returns the parameters after a step, with images that are attacked once, and gradients taken
    twice."""
    images, labels = batch['image'], batch['label']
    statistics, attack = variables['batch_stats'], dict(config.attack)

    def eval_logits(images):
        return module.apply(variables, images)

    def divergence(clean, attacked):
        clean, attacked = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
        return jnp.sum(jnp.exp(clean) * (clean - attacked), axis=-1)

    clean_target = eval_logits(images)
    adversarial = pgd(
        eval_logits,
        key,
        images,
        labels,
        start=images + START_NOISE * batch['noise'],
        loss=Partial(lambda clean, logits, labels: divergence(clean, logits), clean_target),
        **attack,
    )

    @jax.grad
    def gradient(params):
        network = {'params': params, 'batch_stats': statistics}
        clean, attacked = (
            module.apply(network, x, train=True, mutable=['batch_stats'])[0]
            for x in (images, adversarial)
        )
        robust = jnp.mean(divergence(clean, attacked))
        return jnp.mean(cross_entropy(clean, labels)) + config.trades.beta * robust

    def moved(leaf, slope):
        if leaf.ndim < 2:
            return leaf
        return leaf + gamma * jnp.linalg.norm(leaf) * slope / jnp.linalg.norm(slope)

    params = variables['params']
    worst = jax.tree.map(moved, params, gradient(params))
    return jax.tree.map(lambda leaf, slope: leaf - RATE * slope, params, gradient(worst))


def test_trades_is_perturbed_on_the_images_of_its_one_attack():
    config, module, key = default(), Banded(3), jax.random.key(0)
    config.attack.update(eps=0.05, steps=2)
    rng = np.random.default_rng(0)
    shape = (6, 12, 12, 1)
    batch = {
        'image': rng.uniform(0.1, 0.9, shape),
        'label': np.arange(6) % 3,
        'noise': rng.normal(size=shape),
    }
    with jax.enable_x64(True):
        variables = jax.jit(module.init)(jax.random.key(1), batch['image'])
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        _, objective_key = jax.random.split(jax.random.fold_in(key, 0))
        expected = trades_by_hand(module, variables, batch, config, objective_key, gamma=0.05)
        found, metrics = {}, {}
        for gamma in (0.0, 0.05):
            update, state = compiled_step(
                module,
                variables,
                shape,
                config,
                'trades',
                optax.sgd(RATE),
                perturbation=gamma and Perturbation(gamma, 0.0, 'weights'),
            )
            state, metrics[gamma] = update(state, batch, key)
            found[gamma] = state.variables
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        found[0.05]['params'],
        expected,
    )
    # What is evaluated is not the perturbed network.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        (found[0.05]['batch_stats'], metrics[0.05]),
        (found[0.0]['batch_stats'], metrics[0.0]),
    )


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('pretrain.perturbation.space', 'scores', 'weights: scores train in prune'),
        ('finetune.perturbation.space', 'score', "did you mean 'scores'"),
        ('prune.perturbation.warmup_epochs', 10.0, 'below epochs'),
        ('prune.perturbation.gamma', 1.0, 'at least 0 and below 1'),
        ('finetune.distillation', -1.0, 'at least 0'),
    ],
)
def test_settings_that_make_no_sense_are_refused(field, value, message):
    config = default()
    config.prune.perturbation.gamma = 0.01
    check(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=f'config.{field} .*{message}'):
        check(config)


def test_a_step_moves_towards_the_teachers_soft_labels():
    mask = np.array([[1.0, 0], [1, 1], [0, 1]])
    variables = {'params': as_kernel(KERNEL), 'masks': as_kernel(mask)}
    teacher = {'params': as_kernel(TEACHER)}
    found = stepped(variables, 0.0, distillation=0.7, teacher=teacher)['params']
    towards = IMAGES.T @ (softmax(IMAGES @ (KERNEL * mask)) - softmax(IMAGES @ TEACHER)) / 3
    expected = KERNEL - RATE * (slope(KERNEL * mask) + 0.7 * towards) * mask
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_attacked_images_have_soft_labels_too():
    """PGD's loss and, of every image that it looks at, the divergence from the teacher."""
    rng = np.random.default_rng(0)
    batch = {name: rng.random((4, 1, 3, 1)) for name in ('image', 'adversarial')}
    batch |= {'label': np.array([0, 1, 0, 1])}
    batch['teacher'] = {name: rng.normal(size=(4, 2)) for name in ('image', 'adversarial')}

    def logits_of(images, train=False, batch_stats=None):
        return jnp.reshape(images, (4, 3)) @ KERNEL, None

    objective = OBJECTIVES['pgd'](default())
    plain, found = (
        float(of.loss(logits_of, (), batch, None, None)[0])
        for of in (objective, distilled(objective, 0.5))
    )
    divergences = 0.0
    for name, target in batch['teacher'].items():
        teacher, student = softmax(target), softmax(batch[name].reshape(4, 3) @ KERNEL)
        divergences += (teacher * np.log(teacher / student)).sum(1).mean()
    assert found - plain == pytest.approx(0.5 * divergences, rel=1e-5)
    assert distilled(objective, 0.0) is objective


def test_finetune_learns_from_the_pretrained_network_and_goes_on(tiny_config, tmp_path):
    config, part = tiny_config(), 'density_0.5/hydra/finetune'
    config.arch, config.objective, config.methods = 'networks:Banded', 'natural', 'hydra'
    config.densities, config.phases = (0.5,), 'pretrain,prune,finetune'
    config.finetune.distillation = 1.0
    pipeline.run(config, tmp_path / 'run')
    copy = shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    shutil.rmtree(copy / part / 'checkpoints/12')
    assert not checkpoint.is_finished(copy / part)
    pipeline.run(config, copy)
    assert_same(weights(copy / part), weights(tmp_path / 'run' / part))

    config.phases, config.source = 'finetune', str(tmp_path / 'run/density_0.5/hydra/prune')
    with pytest.raises(ValueError, match=r'distillation wants the dense .*: phase: .prune.'):
        pipeline.run(config, tmp_path / 'other')
