"""Robust network pruning in JAX: its public names. Modules and packages are the rooms behind them.

from robustprune_jax import apply_masks, init_scores, pgd, topk_masks
"""

import importlib
import importlib.metadata

# By name, so that what needs none of jax's libraries, such as a report, does not wait for them.
_HOME = {
    'apply_masks': 'pruning',
    'certify': 'smoothing',
    'create_model': 'models',
    'default': 'config',
    'init_scores': 'pruning',
    'intermediate': 'bounds',
    'load': 'zoo',
    'logits_fn': 'network',
    'margins': 'bounds',
    'pgd': 'attacks',
    'predict': 'smoothing',
    'run': 'pipeline',
    'sparsity': 'pruning',
    'standard': 'attacks',
    'topk_masks': 'pruning',
    'verified': 'bounds',
    'verify': 'bounds',
}
__all__ = [*_HOME, '__version__']


def __getattr__(name):
    if name == '__version__':
        return importlib.metadata.version('robustprune_jax')
    if name not in _HOME:
        raise AttributeError(f'robustprune_jax has no name {name!r}')
    return getattr(importlib.import_module(f'robustprune_jax.{_HOME[name]}'), name)


def __dir__():
    return sorted([*globals(), *__all__])
