"""One training step, compiled."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from robustprune_jax.data.augment import to_float
from robustprune_jax.objectives import Objective, Progress
from robustprune_jax.pruning import Choice, effective_params, training_masks
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

    def to_params(leaves):
        variables = {**state.variables, **leaves}
        if spec.choice:
            variables['masks'] = training_masks(spec.choice, variables)
        return effective_params(variables)

    params, pull_back = jax.vjp(to_params, leaves)
    batch_stats = state.variables.get('batch_stats')
    gradient_of = partial(_gradient, spec, state.step, params)
    # No loop without need: convolutions in one are up to four times slower on CPU.
    if spec.accumulate == 1:
        gradient, batch_stats, carry, metrics = gradient_of(batch_stats, batch, state.carry, key)
    else:
        gradient, batch_stats, carry, metrics = _accumulated(
            spec, gradient_of, params, batch_stats, batch, state.carry, key
        )
    if spec.per_device:
        gradient, batch_stats, metrics = jax.lax.pmean((gradient, batch_stats, metrics), 'data')
    (gradient,) = pull_back(gradient)
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


def _penalty(spec, variables, rates):
    return penalty({**variables, 'rates': rates}, spec.choice.budget)


def _gradient(spec, step, params, batch_stats, batch, carry, key):
    """The loss's gradient to the masked parameters, and what else the objective moves."""
    forward = _forward(spec.module, spec.dtype)
    progress = Progress(step, spec.steps_per_epoch, spec.total_steps, spec.ramp_epochs)

    def loss_of(params, carry):
        network = {'params': params}
        if batch_stats is not None:
            network['batch_stats'] = batch_stats
        return spec.objective.loss(Partial(forward, network), carry, batch, key, progress)

    (loss, (carry, batch_stats, metrics)), (gradient, ascent) = jax.value_and_grad(
        loss_of, argnums=(0, 1), has_aux=True
    )(params, carry)
    carry = spec.objective.ascend(carry, ascent)
    return gradient, batch_stats, carry, {'loss': loss, **metrics}


def _accumulated(spec, gradient_of, params, batch_stats, batch, carry, key):
    """The same as of the whole batch, part by part; BatchNorm's statistics move with each."""

    def add_part(sums, part):
        total, batch_stats = sums
        *part, number = part
        part_key = jax.random.fold_in(key, number)
        gradient, batch_stats, carry, metrics = gradient_of(batch_stats, *part, part_key)
        return (jax.tree.map(jnp.add, total, gradient), batch_stats), (carry, metrics)

    nothing = jax.tree.map(jnp.zeros_like, params)
    shards = 1 if spec.per_device else spec.mesh.size
    parts = (*_split((batch, carry), spec.accumulate, shards), jnp.arange(spec.accumulate))
    (total, batch_stats), (carry, metrics) = jax.lax.scan(add_part, (nothing, batch_stats), parts)
    gradient = jax.tree.map(lambda leaf: leaf / spec.accumulate, total)
    metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), metrics)
    return gradient, batch_stats, _join(carry, shards), metrics


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
