"""The running average of a network while it trains (Polyak & Juditsky 1992, exponentially)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.training.optim import trainable


class Average(NamedTuple):
    """decay: what is left of the average after an update; start: the part of a phase's steps before
    which the average is the network itself."""

    decay: float
    start: float


def averaged_collections(variables: dict) -> dict:
    """Returns what is averaged: the collections that train, and BatchNorm's statistics."""
    statistics = {name: variables[name] for name in ('batch_stats',) if name in variables}
    return {**trainable(variables), **statistics}


def after_update(
    settings: Average, average: dict, variables: dict, done: jax.Array | float
) -> dict:
    """Returns decay * average + (1 - decay) * variables, the variables themselves before the start;
    done: the part of the phase's steps before this update's."""
    decay = jnp.where(done < settings.start, 0.0, settings.decay)
    return jax.tree.map(
        lambda old, new: new + decay * (old - new), average, averaged_collections(variables)
    )
