"""Experiments: the schema with every field, and what recipes share.

from robustprune_jax.config import default, with_argument
"""

from robustprune_jax.config.schema import (
    PHASES,
    TRAINED,
    certificates,
    completed,
    default,
    fields,
    identity,
    names,
    objective_name,
    phases,
    pseudo_per_batch,
    repeats,
    smoke,
    with_argument,
)

__all__ = [
    'PHASES',
    'TRAINED',
    'certificates',
    'completed',
    'default',
    'fields',
    'identity',
    'names',
    'objective_name',
    'phases',
    'pseudo_per_batch',
    'repeats',
    'smoke',
    'with_argument',
]
