"""Masks from scores, as torch will find them."""

import warnings

import numpy as np


def top_mask(scores: np.ndarray, kept: int) -> np.ndarray:
    """Returns the 0/1 mask of the `kept` largest |scores|; among equals the lower flat index wins.

    The same masks as robustprune_jax.pruning.masks.topk_masks, which compiles for every shape and
    density: seconds for a network that is only converted.
    """
    magnitudes = np.abs(scores).ravel()
    threshold = np.partition(magnitudes, -kept)[-kept]
    mask = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    mask[ties[: kept - np.count_nonzero(mask)]] = True
    return mask.reshape(scores.shape).astype(scores.dtype)


def separated(scores: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> dict:
    """Returns the scores with every kept |score| above every pruned one.

    torch sorts the scores in its own memory order, and not stably: where a kept and a pruned score
    are equal it may choose another mask. Such pruned scores are moved to the next smaller number
    (kept ones to the smallest normal number where both are 0), and a warning says how many.
    scores, masks: {path: array}. Raises ValueError where a mask is not that of the largest scores.
    """
    result, moved = {}, {}
    for path, score in scores.items():
        mask = np.asarray(masks[path]) != 0 if path in masks else np.ones(score.shape, bool)
        magnitudes = np.abs(score)
        lowest_kept = magnitudes[mask].min(initial=np.inf)
        highest_pruned = magnitudes[~mask].max(initial=-1)
        if lowest_kept < highest_pruned:
            raise ValueError(
                f'the mask of {path} is not that of its largest scores, so popup_scores cannot '
                "express it: export layout 'dense'"
            )
        result[path] = score
        if lowest_kept == highest_pruned:
            tied = (magnitudes == lowest_kept) & (mask if lowest_kept == 0 else ~mask)
            apart = (
                np.finfo(score.dtype).tiny
                if lowest_kept == 0
                else np.nextafter(lowest_kept, np.zeros((), score.dtype))
            )
            result[path] = np.where(tied, np.copysign(apart, score), score).astype(score.dtype)
            moved[path] = np.count_nonzero(tied)
    if moved:
        warnings.warn(
            f'{sum(moved.values())} scores tie with the threshold of their layer '
            f'({", ".join(moved)}) and were moved by the least possible, so that torch '
            'chooses the same mask',
            stacklevel=3,
        )
    return result
