"""Which weights stay: methods, and what they are made of.

scores = init_scores(variables['params'])
masks = topk_masks(scores, density=0.1)
"""

from robustprune_jax.pruning.allocation import ALLOCATIONS, Budget, kept_count
from robustprune_jax.pruning.criterion import CRITERIA, Criterion, init_scores, is_kernel
from robustprune_jax.pruning.dynamic import Dynamic
from robustprune_jax.pruning.masks import apply_masks, effective_params, sparsity, topk_masks
from robustprune_jax.pruning.method import (
    METHODS,
    Choice,
    Method,
    choose_masks,
    configured,
    training_masks,
)
from robustprune_jax.pruning.rates import Rates
from robustprune_jax.pruning.structure import STRUCTURES

__all__ = [
    'ALLOCATIONS',
    'CRITERIA',
    'METHODS',
    'STRUCTURES',
    'Budget',
    'Choice',
    'Criterion',
    'Dynamic',
    'Method',
    'Rates',
    'apply_masks',
    'choose_masks',
    'configured',
    'effective_params',
    'init_scores',
    'is_kernel',
    'kept_count',
    'sparsity',
    'topk_masks',
    'training_masks',
]
