"""One training step, compiled."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robustprune_jax.data.augment import to_float
from robustprune_jax.objectives import Objective
from robustprune_jax.pruning import Choice, apply_masks
from robustprune_jax.pruning.dynamic import move
from robustprune_jax.pruning.perturb import Perturbation
from robustprune_jax.pruning.rates import after_step, excess, penalty
from robustprune_jax.runtime import compiler
from robustprune_jax.training.average import Average, after_update, averaged_collections
from robustprune_jax.training.gradient import gradient
from robustprune_jax.training.optim import reset_moments, trainable
from robustprune_jax.training.state import TrainState


def create_state(
    variables: dict,
    tx: optax.GradientTransformation,
    objective: Objective,
    batch_shape: tuple,
    averages: bool = False,
    teacher: dict | None = None,
) -> TrainState:
    """Returns the state at step 0, with copies of `variables` (the step donates its buffers).

    averages: whether the step has an average. teacher: as the state has it.
    """
    variables = jax.tree.map(jnp.array, variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        optimizer=tx.init(trainable(variables)),
        carry=objective.init_carry(batch_shape),
        first_nan=jnp.full((), -1, jnp.int32),
        average=jax.tree.map(jnp.array, averaged_collections(variables)) if averages else {},
        teacher=jax.tree.map(jnp.array, teacher or {}),
    )


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
    metrics and BatchNorm's statistics it has no part. average: of the network, in the state.
    moves: in finetune, how the masks of the variables move, if they do, after the update of a step.
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
    average: Average | None = None
    moves: Choice | None = None

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
    state_specs = TrainState(whole, whole, whole, split, whole, average=whole, teacher=whole)
    if spec.per_device:
        step = jax.shard_map(
            step,
            mesh=spec.mesh,
            in_specs=(state_specs, split, whole),
            out_specs=(state_specs, whole),
            # Gradients are those of each device, and their mean is taken in gradient. With the
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
    move_key = jax.random.fold_in(key, zlib.crc32(b'move'))  # the same on every device
    if spec.per_device:
        key = jax.random.fold_in(key, jax.lax.axis_index('data'))
    augment_key, objective_key = jax.random.split(key)
    batch = {**batch, 'image': spec.augment(augment_key, to_float(batch['image']))}
    update = partial(_update, spec, batch, (objective_key, move_key))
    if spec.objective.repeats == 1 or compiler.backend() == 'cpu':
        repeats = []
        for number in range(spec.objective.repeats):
            state, metrics = update(state, number)
            repeats.append(metrics)
        metrics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *repeats)
    else:
        state, metrics = jax.lax.scan(update, state, jnp.arange(spec.objective.repeats))
    metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), metrics)
    state = state.replace(step=state.step + 1)
    if spec.learns_rates:
        budget, rates = spec.choice.budget, spec.choice.rates
        ends_epoch = state.step % spec.steps_per_epoch == 0
        state = state.replace(variables=after_step(state.variables, budget, rates, ends_epoch))
        metrics['over_budget'] = excess(state.variables, budget)
    return state, metrics


def _update(spec, batch, keys, state, number):
    """One optimizer update on a batch, the number-th; after the last, masks may move."""
    key, move_key = keys
    leaves = trainable(state.variables)
    slopes, dense, batch_stats, carry, metrics = gradient(spec, state, batch, key)
    if spec.learns_rates:
        budget_loss = jax.grad(partial(_penalty, spec, state.variables))(leaves['rates'])
        slopes['rates'] = jax.tree.map(jnp.add, slopes['rates'], budget_loss)
    updates, optimizer = spec.tx.update(slopes, state.optimizer, leaves)
    variables = {**state.variables, **optax.apply_updates(leaves, updates)}
    if batch_stats is not None:
        variables['batch_stats'] = batch_stats
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(optax.tree.norm(updates))
    first_nan = jnp.where((state.first_nan < 0) & ~finite, state.step, state.first_nan)
    average = state.average
    if spec.average:
        average = after_update(spec.average, average, variables, state.step / spec.total_steps)
    if spec.moves:
        every, last = _interval(spec), number == spec.objective.repeats - 1
        done = (state.step + 1) / (spec.moves.dynamic.until * spec.total_steps)
        variables, optimizer, average = jax.lax.cond(
            last & ((state.step + 1) % every == 0) & (done < 1),
            partial(_moved, spec, dense, done, move_key),
            lambda *network: network,
            *(variables, optimizer, average),
        )
    state = state.replace(variables=variables, optimizer=optimizer, carry=carry, average=average)
    return state.replace(first_nan=first_nan), metrics


def _interval(spec):
    """Steps between two moves of the masks."""
    steps = spec.moves.dynamic.interval * spec.steps_per_epoch / spec.objective.repeats
    return max(round(steps), 1)


def _moved(spec, dense, done, key, variables, optimizer, average):
    """The network with its masks moved. What has grown starts at 0, without moments, also in the
    average: what is masked trains by weight decay alone."""
    choice, before = spec.moves, flatten_dict(variables['masks'])
    kernels, slopes = flatten_dict(variables['params']), flatten_dict(dense)
    per_class = {choice.budget.head: choice.budget.per_class}
    masks = move(kernels, before, slopes, choice.dynamic, done, key, per_class)
    keep = unflatten_dict({path: 1 - mask * (1 - before[path]) for path, mask in masks.items()})

    def cleared(network):
        return {**network, 'params': apply_masks(network['params'], keep)}

    variables = {**cleared(variables), 'masks': unflatten_dict(masks)}
    ones = jax.tree.map(jnp.ones_like, trainable(variables))
    optimizer = reset_moments(spec.tx, optimizer, cleared(ones))
    return variables, optimizer, cleared(average) if average else average


def _penalty(spec, variables, rates):
    return penalty({**variables, 'rates': rates}, spec.choice.budget)
