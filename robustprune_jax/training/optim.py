"""Schedules, optimizers, and which leaves train in which phase."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from robustprune_jax.runtime.registry import lookup


def cosine(section: ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns half a cosine from learning_rate to 0, moving every step (Loshchilov & Hutter)."""
    return optax.cosine_decay_schedule(section.learning_rate, steps)


def original_cosine(section: ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the original's cosine: per epoch e, learning_rate * (1 + cos(pi * (e - 1) / E)) / 2.

    Its peak is epoch 1, not 0, and it does not reach 0.
    """
    epochs, peak = steps / steps_per_epoch, section.learning_rate

    def schedule(step):
        return peak * 0.5 * (1 + jnp.cos(jnp.pi * (step // steps_per_epoch - 1) / epochs))

    return schedule


def step_decay(section: ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the original's steps: times 0.1 from three quarters on, 0.01 from nine tenths."""
    return optax.piecewise_constant_schedule(
        section.learning_rate, {math.ceil(0.75 * steps): 0.1, math.ceil(0.9 * steps): 0.1}
    )


def milestones(section: ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns learning_rate, times section.decay from each of section.milestones on.

    Milestones are epochs of the phase; `steps` are those of it that follow the warm-up.
    """
    warmup = section.epochs * steps_per_epoch - steps
    first = [max(round(epoch * steps_per_epoch) - warmup, 0) for epoch in section.milestones]
    return lambda step: section.learning_rate * section.decay ** sum(step >= at for at in first)


def constant(section: ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns learning_rate at every step."""
    return optax.constant_schedule(section.learning_rate)


SCHEDULES: dict[str, Callable[[ConfigDict, int, int], optax.Schedule]] = {
    'cosine': cosine,
    'original_cosine': original_cosine,
    'step': step_decay,
    'milestones': milestones,
    'constant': constant,
}

# Up to the learning rate, with PyTorch's constants: the momentum is of gradients, not of steps.
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    'sgd': lambda momentum: optax.trace(momentum) if momentum else optax.identity(),
    'adam': lambda momentum: optax.scale_by_adam(),
    'rmsprop': lambda momentum: optax.chain(
        optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
        optax.trace(momentum) if momentum else optax.identity(),
    ),
}


def schedule(section: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate by step of one phase: linear warm-up, then section.schedule."""
    warmup = warmup_steps(section, steps_per_epoch)
    steps = section.epochs * steps_per_epoch - warmup
    shape = lookup(SCHEDULES, section.schedule, 'schedule')
    after = shape(section, steps, steps_per_epoch)
    if not warmup:
        return after
    ramp = optax.linear_schedule(0.0, section.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def warmup_steps(section: ConfigDict, steps_per_epoch: int) -> int:
    """Returns how many steps of a phase the linear warm-up takes."""
    return round(section.warmup_epochs * steps_per_epoch)


def phase_labels(variables: dict, phase: str, freeze_bn: bool = False) -> dict:
    """Returns 'train', 'rates' or 'freeze' for every leaf of the trainable collections in `phase`.

    pretrain and finetune train all parameters; prune trains the scores, the rates where there are
    any and, unless freeze_bn, BatchNorm's scale and bias (the original's default).
    """
    statistics = {path[:-1] for path in flatten_dict(variables.get('batch_stats', {}))}

    def label(path):
        if phase != 'prune':
            trains = path[0] == 'params'
        elif path[0] == 'rates':
            return 'rates'
        elif path[0] == 'scores':
            trains = True
        else:
            trains = path[1:-1] in statistics and not freeze_bn
        return 'train' if trains else 'freeze'

    leaves = flatten_dict(trainable(variables))
    return unflatten_dict({path: label(path) for path in leaves})


def trainable(variables: dict) -> dict:
    """Returns the collections that gradients reach: params, and scores and rates if there are."""
    return {name: variables[name] for name in ('params', 'scores', 'rates') if name in variables}


def reset_moments(
    tx: optax.GradientTransformation, state: optax.OptState, keep: dict
) -> optax.OptState:
    """Returns an optimizer's state with its moments times `keep`, 0 or 1 of the trainable
    collections."""

    def kept(moment, keep):
        return moment if is_none(moment) else moment * keep

    def is_none(moment):  # of a leaf of another branch
        return isinstance(moment, optax.MaskedNode)

    return optax.tree_utils.tree_map_params(tx, kept, state, keep, is_leaf=is_none)


def optimizer(
    section: ConfigDict, labels: dict, steps_per_epoch: int, rates: ConfigDict | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer of one phase over its trainable collections.

    Weight decay is inside the 'train' branch: frozen leaves do not decay, and have no state. rates:
    learning_rate and momentum of the leaves labelled 'rates': SGD at a constant rate, whatever the
    phase has.
    """
    train = optax.chain(
        optax.add_decayed_weights(section.weight_decay),
        lookup(OPTIMIZERS, section.optimizer, 'optimizer')(section.momentum),
        optax.scale_by_learning_rate(schedule(section, steps_per_epoch)),
    )
    branches = {'train': train, 'freeze': optax.set_to_zero()}
    if rates:
        branches['rates'] = optax.sgd(rates.learning_rate, rates.momentum)
    return optax.multi_transform(branches, labels)
