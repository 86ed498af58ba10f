"""What a conversion says of the network it converted."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from robustprune_jax.pruning import sparsity

_NOT_PARAMETERS = ('running_mean', 'running_var', 'num_batches_tracked', 'popup_scores')


def summarise(
    path: str | os.PathLike, arch: str, state_dict: Mapping[str, np.ndarray], variables: dict
) -> dict:
    """Returns {'arch', 'tensors', 'parameters', 'kept', 'prunable', 'density', 'bytes'}.

    tensors and parameters are those of the torch file (statistics and scores are no parameters),
    kept and prunable those of the layers that compute; density is kept / prunable, bytes the size
    of the file `path`.
    """
    parameters = [a for name, a in state_dict.items() if not name.endswith(_NOT_PARAMETERS)]
    return {
        'arch': arch,
        'tensors': len(state_dict),
        'parameters': sum(array.size for array in parameters),
        **sparsity(variables)['total'],
        'bytes': Path(path).stat().st_size,
    }


def line(summary: dict) -> str:
    """Returns the summary as one line of text."""
    return (
        '{arch}, {tensors} tensors, {parameters:,} parameters, density {density:.4g} '
        '({kept:,} of {prunable:,} weights kept), {bytes:,} bytes'
    ).format(**summary)
