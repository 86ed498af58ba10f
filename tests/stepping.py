"""A compiled training step, for the tests that take some."""

import flax.linen as nn
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.objectives.distillation import distilled
from robustprune_jax.pruning import Budget, Choice
from robustprune_jax.runtime.sharding import make_mesh
from robustprune_jax.training.optim import optimizer, phase_labels
from robustprune_jax.training.state import place
from robustprune_jax.training.step import Step, create_state, train_step


def phase_optimizer(config: ConfigDict, phase: str, variables: dict):
    """Returns the optimizer of a phase that has one step per epoch."""
    return optimizer(config[phase], phase_labels(variables, phase), 1)


def compiled_step(
    module: nn.Module,
    variables: dict,
    batch_shape: tuple,
    config: ConfigDict,
    objective: str,
    tx: optax.GradientTransformation,
    *,
    density: float | None = None,
    augment: str = 'none',
    mesh: Mesh | None = None,
    total_steps: int = 1,
    distillation: float = 0.0,
    teacher: dict | None = None,
    **settings,
):
    """Returns a step, on all devices unless a mesh is given, and the state that it starts from."""
    objective = distilled(OBJECTIVES[objective](config), distillation)
    mesh = mesh or make_mesh()
    update = train_step(
        Step(
            module,
            objective,
            tx,
            AUGMENTATIONS[augment],
            mesh,
            steps_per_epoch=1,
            total_steps=total_steps,
            choice=density and Choice(Budget(density)),
            **settings,
        )
    )
    averages = settings.get('average') is not None
    state = create_state(variables, tx, objective, batch_shape, averages, teacher)
    return update, place(state, mesh)
