"""One training step, compiled."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from robustprune_jax.data.augment import to_float
from robustprune_jax.objectives import Objective, Progress
from robustprune_jax.objectives.objective import as_given
from robustprune_jax.pruning import Choice, effective_params, is_kernel, training_masks
from robustprune_jax.pruning.perturb import SPACES, Perturbation, perturb
from robustprune_jax.pruning.rates import after_step, excess, penalty
from robustprune_jax.runtime import compiler
from robustprune_jax.training.optim import trainable
from robustprune_jax.training.state import TrainState


def create_state(
    variables: dict, tx: optax.GradientTransformation, objective: Objective, batch_shape: tuple
) -> TrainState:
    """Returns the state at step 0, with copies of `variables` (the step donates its buffers)."""
    variables = jax.tree.map(jnp.array, variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        optimizer=tx.init(trainable(variables)),
        carry=objective.init_carry(batch_shape),
        first_nan=jnp.full((), -1, jnp.int32),
    )


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


class Step(NamedTuple):
    """What one step is made of, all of it known when it is compiled.

    A step makes objective.repeats updates on its batch. augment: (key, images) -> images.
    ramp_epochs: over how many epochs the eps of certified objectives rises.
    choice: in the prune phase, how the masks follow from the scores: they are computed once per
    update, and gradients reach the scores straight through. None: those of the variables, if any,
    apply.
    accumulate: in how many parts, one after the other, an update's gradient is computed.
    batch_norm: 'global', or 'per_device': statistics of each device's part, as under jax.pmap.
    compute_dtype: 'bfloat16' computes the network, not the loss and the update, in it.
    matmul_precision: jax's name of how exact products are; '' is its default.
    perturbation: of weights or scores, at which an update's gradient is taken; of the attack, the
    metrics and BatchNorm's statistics it has no part.
    """

    module: linen.Module
    objective: Objective
    tx: optax.GradientTransformation
    augment: Callable[[jax.Array, jax.Array], jax.Array]
    mesh: Mesh
    steps_per_epoch: int
    total_steps: int
    ramp_epochs: float = 0.0
    choice: Choice | None = None
    accumulate: int = 1
    batch_norm: str = 'global'
    compute_dtype: str = 'float32'
    matmul_precision: str = ''
    perturbation: Perturbation | None = None

    @property
    def per_device(self) -> bool:
        return self.batch_norm == 'per_device'

    @property
    def learns_rates(self) -> bool:
        return self.choice is not None and self.choice.rates is not None

    @property
    def dtype(self) -> jnp.dtype | None:
        return None if self.compute_dtype == 'float32' else jnp.dtype(self.compute_dtype)


def train_step(spec: Step) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """Returns the compiled step: (state, batch, key) -> state, metrics; the state is donated.

    batch: 'image' uint8 or float32 [B, H, W, C] and 'label' int [B]. key: the phase's key; the step
    number is folded in.
    """
    step = compiler.precision(spec.matmul_precision)(partial(_step, spec))
    whole, split = PartitionSpec(), PartitionSpec('data')
    state_specs = TrainState(whole, whole, whole, carry=split, first_nan=whole)
    if spec.per_device:
        step = jax.shard_map(
            step,
            mesh=spec.mesh,
            in_specs=(state_specs, split, whole),
            out_specs=(state_specs, whole),
            # Gradients are those of each device, and their mean is taken in _update. With the
            # check, they would be sums over the devices already.
            check_vma=False,
        )
    return jax.jit(
        step,
        donate_argnums=0,
        # Named, so that no compiler choice of layout recompiles the second step.
        out_shardings=jax.tree.map(partial(NamedSharding, spec.mesh), (state_specs, whole)),
        compiler_options=compiler.options(),
    )


def _step(spec, state, batch, key):
    key = jax.random.fold_in(key, state.step)
    if spec.per_device:
        key = jax.random.fold_in(key, jax.lax.axis_index('data'))
    augment_key, objective_key = jax.random.split(key)
    batch = {**batch, 'image': spec.augment(augment_key, to_float(batch['image']))}
    if spec.objective.repeats == 1 or compiler.backend() == 'cpu':
        repeats = []
        for _ in range(spec.objective.repeats):
            state, metrics = _update(spec, state, batch, objective_key)
            repeats.append(metrics)
        metrics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *repeats)
    else:
        state, metrics = jax.lax.scan(
            lambda state, _: _update(spec, state, batch, objective_key),
            state,
            length=spec.objective.repeats,
        )
    metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), metrics)
    state = state.replace(step=state.step + 1)
    if spec.learns_rates:
        budget, rates = spec.choice.budget, spec.choice.rates
        ends_epoch = state.step % spec.steps_per_epoch == 0
        state = state.replace(variables=after_step(state.variables, budget, rates, ends_epoch))
        metrics['over_budget'] = excess(state.variables, budget)
    return state, metrics


def _update(spec, state, batch, key):
    """One optimizer update on a batch."""
    leaves = trainable(state.variables)
    params, pull_back = jax.vjp(partial(_params, spec, state.variables), leaves)
    gradient, batch_stats, carry, metrics, batch = _gradient(spec, state, params, batch, key)
    (gradient,) = pull_back(gradient)
    if spec.perturbation:
        gradient = _perturbed_gradient(spec, state, params, gradient, batch, key)
    if spec.learns_rates:
        budget_loss = jax.grad(partial(_penalty, spec, state.variables))(leaves['rates'])
        gradient['rates'] = jax.tree.map(jnp.add, gradient['rates'], budget_loss)
    updates, optimizer = spec.tx.update(gradient, state.optimizer, leaves)
    variables = {**state.variables, **optax.apply_updates(leaves, updates)}
    if batch_stats is not None:
        variables['batch_stats'] = batch_stats
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(optax.tree.norm(updates))
    first_nan = jnp.where((state.first_nan < 0) & ~finite, state.step, state.first_nan)
    return TrainState(state.step, variables, optimizer, carry, first_nan), metrics


def _params(spec, variables, leaves):
    """What the network computes with, of the trainable collections."""
    variables = {**variables, **leaves}
    if spec.choice:
        variables['masks'] = training_masks(spec.choice, variables)
    return effective_params(variables)


def _perturbed_gradient(spec, state, params, gradient, batch, key):
    """The gradient where the perturbation leads, on the images that are attacked already."""
    settings, leaves = spec.perturbation, trainable(state.variables)
    name = SPACES[settings.space]
    masked = params if name == 'params' else leaves[name]
    tree, slopes = (
        {p: x for p, x in flatten_dict(of).items() if is_kernel(p, x)}
        for of in (masked, gradient[name])
    )
    warm = state.step >= settings.warmup_epochs * spec.steps_per_epoch
    moves = perturb(tree, slopes, jnp.where(warm, settings.gamma, 0.0))
    flat = flatten_dict(leaves[name])
    moved = {path: flat[path] + move for path, move in moves.items()}
    leaves[name] = unflatten_dict({**flat, **moved})
    params, pull_back = jax.vjp(partial(_params, spec, state.variables), leaves)
    attacked = spec._replace(objective=spec.objective._replace(inner=as_given))
    gradient, *_ = _gradient(attacked, state, params, batch, key)
    return pull_back(gradient)[0]


def _penalty(spec, variables, rates):
    return penalty({**variables, 'rates': rates}, spec.choice.budget)


def _gradient(spec, state, params, batch, key):
    """The loss's gradient to the masked parameters, what else the objective moves, its metrics and
    the batch with what it attacked: of all parts and devices."""
    part_of = partial(_part, spec, state.step, params)
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


def _part(spec, step, params, batch_stats, batch, carry, key):
    """_gradient of one part of a batch, on one device."""
    forward = _forward(spec.module, spec.dtype)
    progress = Progress(step, spec.steps_per_epoch, spec.total_steps, spec.ramp_epochs)

    def logits_of(params):
        network = {'params': params}
        if batch_stats is not None:
            network['batch_stats'] = batch_stats
        return Partial(forward, network)

    batch = spec.objective.inner(logits_of(params), batch, key, progress)

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
