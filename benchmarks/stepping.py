"""A compiled training step, for the benchmarks that take some."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from robustprune_jax.config import objective_name
from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.pruning import Budget, Choice
from robustprune_jax.training.optim import optimizer, phase_labels
from robustprune_jax.training.step import Step, create_state, train_step

STEPS_PER_EPOCH, STEPS = 100, 2000


def training_step(
    config: ConfigDict, phase: str, module: nn.Module, variables: dict, mesh: Mesh
) -> tuple[Callable, Callable]:
    """Returns the step of a phase, and create_state of (variables, batch_shape=...) for it."""
    objective = OBJECTIVES[objective_name(config, phase)](config)
    tx = optimizer(config[phase], phase_labels(variables, phase), STEPS_PER_EPOCH)
    update = train_step(
        Step(
            module,
            objective,
            tx,
            AUGMENTATIONS[config.dataset.augment],
            mesh,
            steps_per_epoch=STEPS_PER_EPOCH,
            total_steps=STEPS,
            ramp_epochs=config[phase].ramp_epochs,
            choice=Choice(Budget(config.densities[0])) if phase == 'prune' else None,
            accumulate=config.accumulate,
            batch_norm=config.batch_norm,
            compute_dtype=config.compute_dtype,
        )
    )
    return update, partial(create_state, tx=tx, objective=objective)
