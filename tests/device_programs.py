"""What only several devices can show: python tests/device_programs.py, on simulated ones.

Prints the error, or null, of each program as JSON. They share one start of the interpreter.
"""

import json
import re
import traceback

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from stepping import compiled_step, phase_optimizer

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.config import default
from robustprune_jax.models.layers import batch_norm
from robustprune_jax.pruning import Budget, Choice, init_scores, topk_masks
from robustprune_jax.pruning.dynamic import Dynamic
from robustprune_jax.pruning.perturb import Perturbation
from robustprune_jax.runtime import sharding
from robustprune_jax.training.average import Average

SHAPE = (16, 16, 16, 3)
DENSITY = 0.1


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (3, 3))(images)
        x = nn.relu(batch_norm(x, train, 'bn0'))
        x = nn.Conv(16, (3, 3), (2, 2))(x)
        x = nn.relu(batch_norm(x, train, 'bn1'))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


MODULE = Small()


def inputs(phase, dtype):
    variables = dict(jax.jit(MODULE.init)(jax.random.key(0), np.zeros((1, *SHAPE[1:]))))
    if phase == 'prune':
        variables['scores'] = init_scores(variables['params'])
    if phase == 'finetune':
        variables['masks'] = topk_masks(init_scores(variables['params']), DENSITY)
    batch = {
        'image': golden.formula_images((SHAPE[0], 3, 16, 16)).astype(dtype),
        'label': golden.formula_labels(SHAPE[0]).astype(np.int32),
    }
    return jax.tree.map(lambda x: np.asarray(x, dtype), variables), batch


def prepared(phase, name, devices, dtype=np.float32, augment='crop_flip', **settings):
    """Returns a step on so many devices, its state and its batch."""
    config = default()
    config.attack.update(steps=2)
    config.free.n_repeats = 2
    variables, batch = inputs(phase, dtype)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    update, state = compiled_step(
        MODULE,
        variables,
        SHAPE,
        config,
        name,
        phase_optimizer(config, phase, variables),
        density=DENSITY if phase == 'prune' else None,
        augment=augment,
        mesh=mesh,
        **settings,
    )
    state = state.replace(carry=jax.tree.map(lambda x: x.astype(dtype), state.carry))
    return update, state, sharding.put(batch, sharding.sharded(mesh))


def after(steps, *arguments, **settings):
    """Returns the state and metrics after so many steps, as numpy."""
    update, state, batch = prepared(*arguments, **settings)
    for _ in range(steps):
        state, metrics = update(state, batch, jax.random.key(1))
    return jax.device_get((state, metrics))


def moving(grow):
    return Choice(Budget(DENSITY), dynamic=Dynamic(grow, interval=2.0, fraction=0.5))


def assert_close(one, other, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, 1e-12), one, other)


def trades():
    """Prune with BatchNorm, augmentation, perturbed scores and an average. In float64, where an
    attack amplifies no rounding."""
    settings = {'perturbation': Perturbation(0.01, 0.0, 'scores'), 'average': Average(0.9, 0.0)}
    assert_close(*(after(5, 'prune', 'trades', n, np.float64, **settings) for n in (1, 4)), 1e-9)


def free():
    """The perturbation is split over the devices; masks move by the gradient of all of them."""
    settings = {'total_steps': 4, 'moves': moving('gradient')}
    assert_close(*(after(3, 'finetune', 'free', n, np.float64, **settings) for n in (1, 4)), 1e-9)


def natural():
    """In float32, without an attack: relative to the whole vector of parameters."""
    one, other = (ravel_pytree(after(5, 'pretrain', 'natural', n)[0].variables)[0] for n in (1, 4))
    assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(one)


def per_device():
    """The step under jax.pmap, written out: local statistics, and means over the devices."""
    variables, batch = inputs('pretrain', np.float64)
    settings = {'augment': 'none', 'batch_norm': 'per_device'}
    state, metrics = after(3, 'pretrain', 'natural', 4, np.float64, **settings)

    config = default()
    tx = phase_optimizer(config, 'pretrain', variables)

    def step(variables, opt_state, batch):
        def loss(params):
            logits, moved = MODULE.apply(
                {**variables, 'params': params}, batch['image'], True, mutable=['batch_stats']
            )
            return jnp.mean(cross_entropy(logits, batch['label'])), moved['batch_stats']

        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(variables['params'])
        value, moved, gradient = jax.lax.pmean((value, moved, gradient), 'data')
        leaves = {'params': variables['params']}
        updates, opt_state = tx.update({'params': gradient}, opt_state, leaves)
        return {**optax.apply_updates(leaves, updates), 'batch_stats': moved}, opt_state, value

    mapped = jax.pmap(
        step, 'data', in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:4]
    )
    parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
    opt_state = tx.init({'params': variables['params']})
    for _ in range(3):
        variables, opt_state, value = mapped(variables, opt_state, parts)
    assert_close((state.variables, metrics['loss']), (variables, value), 1e-9)
    whole, _ = after(3, 'pretrain', 'natural', 4, np.float64, augment='none')
    assert np.abs(whole.variables['batch_stats']['bn0']['var']
                  - state.variables['batch_stats']['bn0']['var']).max() > 1e-6  # fmt: skip


def per_device_attacked():
    """Four devices with the same images and noise do what one of them does; masks move at random
    in finetune."""
    for phase, moves in (('finetune', moving('random')), ('prune', None)):
        settings = {'augment': 'none', 'batch_norm': 'per_device'}
        settings['perturbation'] = Perturbation(0.01, 0.0, 'weights')
        settings |= {'total_steps': 4, 'moves': moves}
        ends = []
        for n in (1, 4):
            update, state, batch = prepared(phase, 'trades', n, np.float64, **settings)
            part = {name: jax.device_get(leaf)[:4] for name, leaf in batch.items()}
            part['noise'] = np.random.default_rng(0).standard_normal(part['image'].shape)
            batch = {name: np.concatenate(n * [leaf]) for name, leaf in part.items()}
            mesh = sharding.make_mesh(jax.devices()[:n])
            for _ in range(3):
                split = sharding.put(batch, sharding.sharded(mesh))
                state, metrics = update(state, split, jax.random.key(1))
            ends.append(jax.device_get((state, metrics)))
        assert_close(*ends, 1e-9)


def collectives():
    """A step on 8 devices sums gradients, BatchNorm's sums and metrics; nothing is gathered."""
    update, state, batch = prepared('prune', 'trades', 8)
    sizes = {leaf.size for leaf in jax.tree.leaves(state.variables['params'])}
    channels = {leaf.size for leaf in jax.tree.leaves(state.variables['batch_stats'])}
    program = update.lower(state, batch, jax.random.key(0)).compile().as_text()
    kinds = (
        'all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|all-reduce'
    )
    found = re.findall(rf'= (\(?[^()]*\)?) ({kinds})(?:-start)?\(', program)
    assert {kind for _, kind in found} == {'all-reduce'}
    for shapes, _ in found:
        for shape in re.findall(r'\[([\d,]*)\]', shapes):
            size = np.prod([int(n) for n in shape.split(',') if n], dtype=int)
            assert size in sizes | channels | {1}, shapes


def error_of(program, in_float64):
    try:
        with jax.enable_x64(in_float64):
            program()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == '__main__':
    exact, single = (trades, free, per_device, per_device_attacked), (natural, collectives)
    errors = {program.__name__: error_of(program, program in exact) for program in exact + single}
    print(json.dumps(errors))
