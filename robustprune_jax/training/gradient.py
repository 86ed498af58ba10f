"""The gradient of one update: of all parts of a batch and all devices, perturbed where asked.

spec: a training.step.Step.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

from robustprune_jax.objectives import Progress
from robustprune_jax.objectives.distillation import soft_labels
from robustprune_jax.objectives.objective import as_given, eval_logits
from robustprune_jax.pruning import effective_params, is_kernel, training_masks
from robustprune_jax.pruning.perturb import SPACES, perturb
from robustprune_jax.training.optim import trainable


def gradient(spec, state, batch, key):
    """Returns the loss's gradient to the trainable collections and to the masked parameters, what
    BatchNorm's statistics and the carry become, and the metrics: those before any perturbation.
    """
    leaves = trainable(state.variables)
    params_of = partial(_params, spec, state.variables)
    params, pull_back = jax.vjp(params_of, leaves)
    dense, batch_stats, carry, metrics, batch = _whole(spec, state, params, batch, key)
    (slopes,) = pull_back(dense)
    if spec.perturbation:
        leaves = _perturbed(spec, state.step, leaves, params, slopes)
        params, pull_back = jax.vjp(params_of, leaves)
        attacked = spec._replace(objective=spec.objective._replace(inner=as_given))
        dense = _whole(attacked, state, params, batch, key)[0]
        (slopes,) = pull_back(dense)
    return slopes, dense, batch_stats, carry, metrics


def _params(spec, variables, leaves):
    """What the network computes with, of the trainable collections."""
    variables = {**variables, **leaves}
    if spec.choice:
        variables['masks'] = training_masks(spec.choice, variables)
    return effective_params(variables)


def _perturbed(spec, step, leaves, params, slopes):
    """The trainable collections, the kernels or scores of one moved uphill; params: masked."""
    settings = spec.perturbation
    name = SPACES[settings.space]
    tree, slopes = (
        {path: leaf for path, leaf in flatten_dict(of).items() if is_kernel(path, leaf)}
        for of in (params if name == 'params' else leaves[name], slopes[name])
    )
    warm = step >= settings.warmup_epochs * spec.steps_per_epoch
    moves = perturb(tree, slopes, jnp.where(warm, settings.gamma, 0.0))
    flat = flatten_dict(leaves[name])
    moved = {path: flat[path] + move for path, move in moves.items()}
    return {**leaves, name: unflatten_dict({**flat, **moved})}


def _whole(spec, state, params, batch, key):
    """The gradient to the masked parameters, what else the objective moves, its metrics, and the
    batch with what it attacked: of all parts and devices."""
    part_of = partial(_part, spec, state, params)
    batch_stats = state.variables.get('batch_stats')
    # No loop without need: convolutions in one are up to four times slower on CPU.
    if spec.accumulate == 1:
        found = part_of(batch_stats, batch, state.carry, key)
    else:
        found = _accumulated(spec, part_of, params, batch_stats, batch, state.carry, key)
    gradient, batch_stats, carry, metrics, batch = found
    if spec.per_device:
        gradient, batch_stats, metrics = jax.lax.pmean((gradient, batch_stats, metrics), 'data')
    return gradient, batch_stats, carry, metrics, batch


def _part(spec, state, params, batch_stats, batch, carry, key):
    """_whole of one part of a batch, on one device."""
    forward = _forward(spec.module, spec.dtype)
    progress = Progress(state.step, spec.steps_per_epoch, spec.total_steps, spec.ramp_epochs)

    def logits_of(params):
        network = {'params': params}
        if batch_stats is not None:
            network['batch_stats'] = batch_stats
        return Partial(forward, network)

    batch = spec.objective.inner(logits_of(params), batch, key, progress)
    if state.teacher and 'teacher' not in batch:
        teacher = eval_logits(Partial(forward, state.teacher))
        batch = {**batch, 'teacher': soft_labels(teacher, batch)}

    def loss_of(params, carry):
        return spec.objective.loss(logits_of(params), carry, batch, key, progress)

    (loss, (carry, batch_stats, metrics)), (gradient, ascent) = jax.value_and_grad(
        loss_of, argnums=(0, 1), has_aux=True
    )(params, carry)
    carry = spec.objective.ascend(carry, ascent)
    return gradient, batch_stats, carry, {'loss': loss, **metrics}, batch


def _accumulated(spec, part_of, params, batch_stats, batch, carry, key):
    """The same of the whole batch, part by part; BatchNorm's statistics move with each."""

    def add_part(sums, part):
        total, batch_stats = sums
        *part, number = part
        part_key = jax.random.fold_in(key, number)
        gradient, batch_stats, *rest = part_of(batch_stats, *part, part_key)
        return (jax.tree.map(jnp.add, total, gradient), batch_stats), rest

    nothing = jax.tree.map(jnp.zeros_like, params)
    shards = 1 if spec.per_device else spec.mesh.size
    parts = (*_split((batch, carry), spec.accumulate, shards), jnp.arange(spec.accumulate))
    (total, batch_stats), rest = jax.lax.scan(add_part, (nothing, batch_stats), parts)
    carry, metrics, batch = rest
    gradient = jax.tree.map(lambda leaf: leaf / spec.accumulate, total)
    metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), metrics)
    return gradient, batch_stats, _join(carry, shards), metrics, _join(batch, shards)


def _split(tree, parts, shards):
    """Arrays [B, ...] as [parts, B / parts, ...]: of each device's share, so that nothing moves, a
    run of neighbours, among which pseudo-labelled images are spread evenly."""

    def split(x):
        runs = x.reshape(shards, parts, -1, *x.shape[1:])
        return jnp.moveaxis(runs, 1, 0).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, tree)


def _join(tree, shards):
    """Undoes _split."""

    def join(x):
        runs = x.reshape(len(x), shards, -1, *x.shape[2:])
        return jnp.moveaxis(runs, 0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(join, tree)


@cache
def _forward(module: linen.Module, dtype: jnp.dtype | None = None) -> Callable:
    """logits_of of objectives.objective, as one function per module so that it never retraces.

    dtype: what the module computes in; BatchNorm's statistics and the logits stay as they are.
    """

    def cast(tree):
        return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype), tree)

    def apply(variables, images, **kw):
        variables = {**variables, 'params': cast(variables['params'])}
        return module.apply(variables, cast(images), **kw)

    def logits_of(variables, images, train=False, batch_stats=None):
        if batch_stats is not None:
            variables = {**variables, 'batch_stats': batch_stats}
        if not variables.get('batch_stats'):
            return apply(variables, images, train=train).astype(images.dtype), batch_stats
        if not train:
            logits = apply(variables, images, train=False)
            return logits.astype(images.dtype), variables['batch_stats']
        logits, moved = apply(variables, images, train=True, mutable=['batch_stats'])
        return logits.astype(images.dtype), moved['batch_stats']

    return logits_of
