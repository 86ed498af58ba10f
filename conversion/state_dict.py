"""Flax variables to a torch state dict and back, exactly: only transpositions, never arithmetic."""

from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robustprune_jax.pruning import is_kernel, kept_count
from robustprune_jax.runtime.registry import lookup

from . import unused
from .fit import (
    few,
    is_masked,
    likely_architectures,
    mismatch,
    missing_and_unexpected,
    not_tensors,
    unusable,
)
from .layout import from_torch, to_torch
from .names import Layer, generic_leaves, leaves, path_leaves
from .scores import separated, top_mask
from .targets import TARGETS, check_normalisation, unwrapped

LAYOUTS = ('dense', 'subnet')


def export_state_dict(
    variables: dict,
    arch: str | Sequence[Layer] | None,
    *,
    layout: str = 'dense',
    target: str = 'hydra',
) -> dict[str, np.ndarray]:
    """Returns the torch state dict of a network, {torch name: array} in torch's order.

    variables: nested dicts 'params', and where there are any 'batch_stats', 'scores', 'masks',
    'unused' (torch tensors without a counterpart here, as import_state_dict returns them).
    arch: an architecture's name, or for a network of your own its name table, or None for names
    that are its own paths.
    layout: 'dense' multiplies the masks into the weights (exact zeros); 'subnet' writes the weights
    as they are, and the scores as `popup_scores`, with a warning where scores had to be moved to
    tell kept from pruned ones. target: a name of TARGETS, who will load it.
    Arrays may be views of those in `variables`. Tensors without a counterpart that `unused` lacks
    are filled as in a new network. Raises ValueError where the variables are not those of `arch`,
    or the target does not take this architecture or layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'unknown layout {layout!r}; known: {", ".join(LAYOUTS)}')
    lookup(TARGETS, target, 'target').check(arch, layout)
    flat = {
        name: {p: np.asarray(a) for p, a in flatten_dict(variables.get(name, {}), sep='/').items()}
        for name in ('params', 'batch_stats', 'scores', 'masks')
    }
    if layout == 'subnet' and not flat['scores']:
        raise ValueError("layout 'subnet' writes scores, and these variables have none")
    if arch is None:
        table = generic_leaves(flat['params'], flat['batch_stats'], scores=layout == 'subnet')
    else:
        table = leaves(arch, scores=layout == 'subnet')
    _check_paths(flat, table, arch)
    if layout == 'dense':
        flat['params'] |= {
            path: np.where(mask != 0, flat['params'][path], 0)
            for path, mask in flat['masks'].items()
        }
    else:
        flat['scores'] = separated(flat['scores'], flat['masks'])
    state_dict = {}
    for leaf in table:
        if leaf.path is not None:
            state_dict[leaf.torch] = to_torch(flat[leaf.collection][leaf.path], leaf)
        else:
            state_dict[leaf.torch] = unused.fill(leaf, variables.get('unused', {}), state_dict)
    if layout == 'dense':
        _mask_unused(state_dict, table, flat['masks'], variables.get('unused', {}))
    return TARGETS[target].wrap(state_dict, arch)


def import_state_dict(
    state_dict: dict[str, np.ndarray],
    arch: str | Sequence[Layer] | None,
    *,
    num_classes: int | None = None,
    density: float | None = None,
) -> dict:
    """Returns the Flax variables of a torch state dict: nested dicts of (views of) its arrays.

    arch: an architecture's name, or for a network of your own its name table, or None for names
    that are its own paths, which are not compared with a network. Names may have the prefixes of
    DataParallel and of RobustBench's normalising wrapper.
    The variables hold 'params', 'batch_stats' where there is BatchNorm, and 'unused' where torch
    has tensors without a counterpart here. With `density`, the kept fraction, they hold 'masks':
    those of the `popup_scores`, which are kept in 'scores'; of a dense checkpoint those of its
    zeros, whatever its layers keep. A checkpoint with popup_scores does not say its density, so it
    must be given (1 for one that is not pruned yet).
    Raises ValueError where names, shapes or the number of classes are not those of `arch`, where a
    tensor holds a NaN or an infinity, or a variance is below 0, where `density` is missing, or is
    not that of a dense checkpoint.
    """
    if others := not_tensors(state_dict):
        raise ValueError(f'no state dict: {few(others)}')
    state_dict, constants = unwrapped(state_dict)
    if arch is None:
        if bad := unusable(state_dict, path_leaves(state_dict)):
            raise ValueError(f'no weights in {few(bad)}')
    elif problem := mismatch(state_dict, arch, num_classes):
        likely = [name for name in likely_architectures(state_dict) if name != arch]
        hint = f'; the tensors are those of {" or ".join(likely)}' if likely else ''
        label = arch if isinstance(arch, str) else 'the name table'
        raise ValueError(f'not a state dict of {label}: {problem}{hint}')
    check_normalisation(constants, arch)
    if bad := [name for name, array in state_dict.items() if not _is_finite(array)]:
        raise ValueError(f'NaN or infinity in {few(bad)}')
    variances = [name for name in state_dict if name.endswith(('running_var', '/var'))]
    if bad := [name for name in variances if (state_dict[name] < 0).any()]:
        raise ValueError(f'a variance below 0 in {few(bad)}')
    masked = is_masked(state_dict)
    if masked and density is None:
        raise ValueError('the checkpoint has popup_scores but does not say its density: give it')
    flat, extra = {}, {}
    for leaf in path_leaves(state_dict) if arch is None else leaves(arch, scores=masked):
        if leaf.path is not None:
            flat[f'{leaf.collection}/{leaf.path}'] = from_torch(state_dict[leaf.torch], leaf)
        elif leaf.torch in state_dict:
            extra[leaf.torch] = state_dict[leaf.torch]
    variables = unflatten_dict(flat, sep='/')
    if masked:
        variables['masks'] = jax.tree.map(
            lambda scores: top_mask(scores, kept_count(scores.size, density)), variables['scores']
        )
    elif density is not None:
        variables['masks'] = masks_of_zeros(variables['params'])
        _check_density(variables['masks'], density)
    if extra:
        variables['unused'] = extra
    return variables


def masks_of_zeros(params: dict) -> dict:
    """Returns the masks of a pruned network's zeros: 1 for each weight of a kernel that is not."""
    kernels = {path: leaf for path, leaf in flatten_dict(params).items() if is_kernel(path, leaf)}
    return unflatten_dict({path: (leaf != 0).astype(leaf.dtype) for path, leaf in kernels.items()})


def _check_density(masks, density):
    masks = jax.tree.leaves(masks)
    found = sum(map(np.count_nonzero, masks))
    kept = sum(kept_count(mask.size, density) for mask in masks)
    if found > kept:
        raise ValueError(
            f'{found} weights are not 0, and density {density:g} keeps {kept}: the checkpoint is '
            'not pruned that far'
        )


def _mask_unused(state_dict, table, masks, imported):
    path_of = {leaf.torch: leaf.path for leaf in table}
    for leaf in table:
        if leaf.kernel and leaf.path is None:
            mask = masks.get(path_of[unused.twin(leaf.torch)])
            if mask is not None:
                weight, kept = state_dict[leaf.torch], np.count_nonzero(mask)
                state_dict[leaf.torch] = unused.masked(leaf.torch, weight, kept, imported)


def _check_paths(flat, table, arch):
    needed = {f'{leaf.collection}/{leaf.path}' for leaf in table if leaf.path}
    kernels = {leaf.path for leaf in table if leaf.kernel}
    known = needed | {f'{name}/{path}' for name in ('scores', 'masks') for path in kernels}
    found = {f'{name}/{path}' for name in flat for path in flat[name]}
    missing, unexpected = sorted(needed - found), sorted(found - known)
    if missing or unexpected:
        label = arch if isinstance(arch, str) else 'this network'
        what = missing_and_unexpected(missing, unexpected)
        raise ValueError(f'these are not the variables of {label}: {what}')


def _is_finite(array):
    return array.dtype.kind not in 'fV' or bool(np.isfinite(array).all())
