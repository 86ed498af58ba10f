"""A compiled training step, for the benchmarks that take some."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from robustprune_jax.config import Part, objective_name
from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.pruning.perturb import Perturbation
from robustprune_jax.training.average import Average
from robustprune_jax.training.optim import optimizer, phase_labels
from robustprune_jax.training.start import choice
from robustprune_jax.training.step import Step, create_state, train_step

STEPS_PER_EPOCH, STEPS = 100, 2000


def training_step(
    config: ConfigDict,
    phase: str,
    module: nn.Module,
    variables: dict,
    image_shape: tuple[int, ...],
    mesh: Mesh,
) -> tuple[Callable, Callable]:
    """Returns the step of a phase, and create_state of (variables, batch_shape=...) for it."""
    objective = OBJECTIVES[objective_name(config, phase)](config)
    prunes = Part('prune', 'hydra', config.densities[0]) if phase == 'prune' else None
    perturbation = config[phase].perturbation
    average = Average(**config.average) if config.average.decay else None
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
            choice=prunes and choice(config, prunes, module, variables['scores'], image_shape),
            accumulate=config.accumulate,
            batch_norm=config.batch_norm,
            compute_dtype=config.compute_dtype,
            perturbation=Perturbation(**perturbation) if perturbation.gamma else None,
            average=average,
        )
    )
    averages = average is not None
    return update, partial(create_state, tx=tx, objective=objective, averages=averages)
