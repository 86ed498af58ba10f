"""Masks, and the scores that choose them (HYDRA, Sehwag et al., NeurIPS 2020, section 3).

Scores and masks are Flax collections of their own: nested dicts that hold only the prunable leaves,
under the same path as in `params`. Masks are applied outside the module, so any Flax module can be
pruned without special layers:

    scores = init_scores(variables['params'])
    masks = topk_masks(scores, density=0.1)
    logits = module.apply({**variables, 'params': apply_masks(variables['params'], masks)}, images)
"""

from collections.abc import Sequence

import numpy as np
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

from robustprune_jax.graph.paths import live_weights
from robustprune_jax.pruning.allocation import ALLOCATIONS, Allocation, Budget
from robustprune_jax.pruning.criterion import is_kernel
from robustprune_jax.pruning.structure import STRUCTURES
from robustprune_jax.runtime import inputs
from robustprune_jax.runtime.registry import lookup


def topk_masks(
    scores: dict,
    density: float,
    allocation: str = 'uniform',
    structure: str = 'weights',
    **settings,
) -> dict:
    """Returns 0/1 masks that keep the weights of largest |score|, ties to the lower index.

    density: the kept fraction, in (0, 1]. allocation: a name of ALLOCATIONS, how it is shared out
    over the layers: 'uniform' keeps `kept_count(size, density)` weights of each, every other
    `kept_count` of the whole network, exactly, and of each layer one at least. structure: a name of
    STRUCTURES. settings: the other fields of a Budget, such as head and per_class: the path of the
    last layer's kernel, and how many weights each of its outputs keeps at least, where the layer's
    count goes so far.

    The gradient is straight-through: identity in the mask, then through the absolute value, on kept
    and pruned entries alike, so dL/dscore = dL/dW_eff * W * sign(score), where sign(0) = 0.
    Raises ValueError on an unknown name, and on fewer weights than layers and classes need.
    """
    share = lookup(ALLOCATIONS, allocation, 'allocation')
    return masks_within(scores, Budget(density, **settings), share, structure)


def masks_within(
    scores: dict, budget: Budget, allocation: Allocation, structure: str, training: bool = False
) -> dict:
    """Returns topk_masks of a budget; training: those of a step of the prune phase."""
    choose = lookup(STRUCTURES, structure, 'structure')
    return unflatten_dict(choose(flatten_dict(scores), allocation, budget, training))


def apply_masks(params: dict, masks: dict) -> dict:
    """Returns `params` with each masked leaf multiplied by its mask; the others pass unchanged.

    Raises ValueError on a mask that is no parameter's, or that holds other numbers than 0 and 1
    (not looked at inside jit).
    """
    params, masks = flatten_dict(params), flatten_dict(masks)
    for path, mask in masks.items():
        if path not in params or mask.shape != params[path].shape:
            raise ValueError(f'the mask {"/".join(path)}, {mask.shape}, is of no such parameter')
        if inputs.are_here(mask) and not np.isin(mask, (0, 1)).all():
            raise ValueError(f'the mask {"/".join(path)} has other values than 0 and 1: scores?')
    return unflatten_dict(
        {path: leaf * masks[path] if path in masks else leaf for path, leaf in params.items()}
    )


def effective_params(variables: dict) -> dict:
    """Returns the parameters that the network computes with: masked, where there are masks."""
    return apply_masks(variables['params'], variables.get('masks', {}))


def sparsity(
    variables: dict, module: linen.Module | None = None, image_shape: Sequence[int] = ()
) -> dict[str, dict[str, int | float]]:
    """Returns kept and prunable weights per layer, and under 'total' for the network.

    Each entry is {'kept', 'prunable', 'density'}, keyed by the layer's path joined with '/'; with
    the module and its image_shape, (H, W, C), also 'effective', how many of the kept weights lie on
    a path of kept weights from the image to a logit. Without masks every kernel counts as kept.
    Raises ValueError on a network without kernels, and as graph.paths.live_weights does.
    """
    masks = flatten_dict(variables.get('masks', {}))
    if not masks:
        kernels = {p: x for p, x in flatten_dict(variables['params']).items() if is_kernel(p, x)}
        masks = {path: np.ones(leaf.shape, np.float32) for path, leaf in kernels.items()}
    if not masks:
        raise ValueError('the network has no kernels, and no masks')
    counts = {'kept': masks}
    if module is not None:
        masked = {**variables, 'masks': unflatten_dict(masks)}
        counts['effective'] = flatten_dict(live_weights(module, masked, tuple(image_shape))[0])
    found = {
        '/'.join(path[:-1]): {
            **{count: int(np.count_nonzero(of[path])) for count, of in counts.items()},
            'prunable': mask.size,
        }
        for path, mask in masks.items()
    }
    found['total'] = {
        count: sum(layer[count] for layer in found.values()) for count in (*counts, 'prunable')
    }
    return {x: {**n, 'density': n['kept'] / n['prunable']} for x, n in found.items()}
