"""How eps and what depends on it rise over the first epochs of a phase, as fractions in [0, 1]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from robustprune_jax.objectives.objective import Progress


def linear(progress: Progress) -> jax.Array:
    """Returns a straight line, moving every step."""
    return progress.step / (progress.ramp_epochs * progress.steps_per_epoch)


def staircase(progress: Progress) -> jax.Array:
    """Returns the same, moving every epoch (the original's MixTrain)."""
    return (progress.step // progress.steps_per_epoch) / progress.ramp_epochs


def smoothed(progress: Progress) -> jax.Array:
    """Returns a fourth power up to a quarter of the way, then its tangent (Xu et al. 2020)."""
    end = max(progress.ramp_epochs * progress.steps_per_epoch, 1)  # step 0 has nothing, step 1 all
    middle = max(int(end / 4), 1)
    at_middle = middle / (4 * (end - middle) + middle)
    rate = (1 - at_middle) / max(end - middle, 1)
    straight = at_middle + rate * (progress.step - middle)
    return jnp.where(progress.step < middle, at_middle * (progress.step / middle) ** 4, straight)


RAMPS: dict[str, Callable[[Progress], jax.Array]] = {
    'linear': linear,
    'staircase': staircase,
    'smoothed': smoothed,
}


def fraction(ramp: str, progress: Progress) -> jax.Array:
    """Returns RAMPS[ramp] up to its end, then 1; 1 throughout where ramp_epochs is 0."""
    if not progress.ramp_epochs:
        return jnp.ones(())
    return jnp.clip(RAMPS[ramp](progress), 0, 1)


def between(start: float, end: float, risen: jax.Array) -> jax.Array:
    """Returns `start` where nothing has risen, `end` at 1, and what lies between on a line."""
    return start + risen * (end - start)
