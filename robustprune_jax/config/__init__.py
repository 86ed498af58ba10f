"""Experiments: the schema with every field, and what recipes share.

from robustprune_jax.config import default, with_argument
"""

from robustprune_jax.config.arguments import for_method, overrides, smoke, with_argument
from robustprune_jax.config.parts import PHASES, TRAINED, Part, exact
from robustprune_jax.config.schema import (
    certificates,
    completed,
    default,
    fields,
    identity,
    methods,
    names,
    objective_name,
    phases,
    pseudo_per_batch,
    repeats,
)

__all__ = [
    'PHASES',
    'TRAINED',
    'Part',
    'certificates',
    'completed',
    'default',
    'exact',
    'fields',
    'for_method',
    'identity',
    'methods',
    'names',
    'objective_name',
    'overrides',
    'phases',
    'pseudo_per_batch',
    'repeats',
    'smoke',
    'with_argument',
]
