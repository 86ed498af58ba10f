"""The train state, one optimizer update, and the network under evaluation."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, struct
from jax.tree_util import Partial

from robustprune_jax import attacks
from robustprune_jax.data.augment import to_float
from robustprune_jax.masks import effective_params, topk_masks
from robustprune_jax.objectives import Objective, Progress
from robustprune_jax.optim import trainable
from robustprune_jax.sharding import replicated

# XLA's weight gradients of convolutions on CPU are 2 to 4 times slower without it.
CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}


@struct.dataclass
class TrainState:
    """What one update reads and writes.

    first_nan is the first step whose loss or update was not finite, -1 while there is none: it
    stays on the device, so that no step waits for the host.
    """

    step: jax.Array
    variables: dict[str, Any]
    optimizer: Any
    carry: Any
    first_nan: jax.Array


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


def _dense(variables):
    """The collections that the module reads, the masks multiplied in."""
    network = {'params': effective_params(variables)}
    if 'batch_stats' in variables:
        network['batch_stats'] = variables['batch_stats']
    return network


@cache
def _forward(module: linen.Module) -> Callable:
    """logits_of of objectives.objective, as one function per module so that it never retraces."""

    def logits_of(variables, images, train=False, batch_stats=None):
        if batch_stats is not None:
            variables = {**variables, 'batch_stats': batch_stats}
        if not variables.get('batch_stats'):
            return module.apply(variables, images, train=train), batch_stats
        if not train:
            return module.apply(variables, images, train=False), variables['batch_stats']
        logits, moved = module.apply(variables, images, train=True, mutable=['batch_stats'])
        return logits, moved['batch_stats']

    return logits_of


def train_step(
    module: linen.Module,
    objective: Objective,
    tx: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: jax.sharding.Mesh,
    *,
    steps_per_epoch: int,
    total_steps: int,
    ramp_epochs: float = 0.0,
    density: float | None = None,
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """Returns the compiled update: (state, batch, key) -> state, metrics; the state is donated.

    batch: 'image' uint8 or float32 [B, H, W, C] and 'label' int [B]. key: the phase's key; the step
    number is folded in. ramp_epochs: over how many epochs the eps of certified objectives rises.
    density: in the prune phase, the kept fraction: the masks are computed from the scores, once,
    and gradients reach them straight through. Otherwise the masks of `variables`, if any, apply.
    """

    def step(state, batch, key):
        augment_key, objective_key = jax.random.split(jax.random.fold_in(key, state.step))
        images = augment(augment_key, to_float(batch['image']))
        progress = Progress(state.step, steps_per_epoch, total_steps, ramp_epochs)

        def loss_of(leaves):
            variables = {**state.variables, **leaves}
            if density is not None:
                variables['masks'] = topk_masks(variables['scores'], density)
            return objective.loss(
                Partial(_forward(module), _dense(variables)),
                state.carry,
                {**batch, 'image': images},
                objective_key,
                progress,
            )

        leaves = trainable(state.variables)
        (loss, (carry, batch_stats, metrics)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(leaves)
        updates, optimizer = tx.update(gradients, state.optimizer, leaves)
        variables = {**state.variables, **optax.apply_updates(leaves, updates)}
        if 'batch_stats' in variables:
            variables['batch_stats'] = batch_stats
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
        first_nan = jnp.where((state.first_nan < 0) & ~finite, state.step, state.first_nan)
        state = TrainState(state.step + 1, variables, optimizer, carry, first_nan)
        return state, {'loss': loss, **metrics}

    return jax.jit(
        step,
        donate_argnums=0,
        # Named, so that no compiler choice of layout recompiles the second step.
        out_shardings=replicated(mesh),
        compiler_options=CPU_OPTIONS if jax.default_backend() == 'cpu' else None,
    )


def with_masks(variables: dict, density: float | None) -> dict:
    """Returns `variables` with the masks that its scores choose at `density`; as is when None."""
    if density is None:
        return variables
    return {
        **variables,
        'masks': jax.jit(topk_masks, static_argnums=1)(variables['scores'], density),
    }


@cache
def _eval_forward(module: linen.Module) -> Callable:
    return lambda variables, images: module.apply(variables, images, train=False)


def logits_fn(module: linen.Module, variables: dict) -> Partial:
    """Returns the eval-mode network with its masks multiplied in: images -> logits.

    A pytree, to be passed to attacks and bounds; networks of one module share compiled code.
    """
    return Partial(_eval_forward(module), _dense(variables))


@jax.jit
def _predict(network, images):
    return jnp.argmax(network(images), axis=-1)


def predictions(
    network: Partial,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    attack: dict | None = None,
) -> jax.Array:
    """Returns the predicted classes [B], on the images or under attack.

    images: uint8 [B, H, W, C]; attack: settings of attacks.pgd.
    """
    images = to_float(images)
    if attack:
        images = attacks.pgd(network, key, images, labels, **attack)
    return _predict(network, images)
