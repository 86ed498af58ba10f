"""Importance scores and the masks they choose (HYDRA, Sehwag et al., NeurIPS 2020, section 3).

Scores and masks are Flax collections of their own: nested dicts that hold only the prunable leaves,
under the same path as in `params`. Masks are applied outside the module, so any Flax module can be
pruned without special layers:

    scores = init_scores(variables['params'])
    masks = topk_masks(scores, density=0.1)
    logits = module.apply({**variables, 'params': apply_masks(variables['params'], masks)}, images)
"""

import math
import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robustprune_jax.runtime import inputs
from robustprune_jax.runtime.registry import lookup


def is_kernel(path: tuple[str, ...], leaf: jax.Array) -> bool:
    """True for the kernels of conv and dense layers; never for biases or normalisation layers."""
    return path[-1] == 'kernel' and leaf.ndim >= 2


def _fan_in(kernel):
    return math.prod(kernel.shape[:-1])


def _scaled(kernel, key):
    # HYDRA, equation 5: proportional to the pretrained weight. The ranking is |W|, so the first
    # mask is that of least weight magnitude (LWM).
    largest = jnp.max(jnp.abs(kernel))
    return jnp.sqrt(6 / _fan_in(kernel)) * kernel / jnp.where(largest > 0, largest, 1)


def _random(scale, mode, distribution):
    def init(kernel, key):
        initializer = jax.nn.initializers.variance_scaling(scale, mode, distribution)
        return initializer(key, kernel.shape, kernel.dtype)

    return init


SCORE_INITS: dict[str, Callable] = {
    'scaled': _scaled,
    'kaiming_uniform': _random(2.0, 'fan_in', 'uniform'),
    'kaiming_normal': _random(2.0, 'fan_in', 'normal'),
    'xavier_uniform': _random(2.0, 'fan_avg', 'uniform'),
    'xavier_normal': _random(2.0, 'fan_avg', 'normal'),
}


def init_scores(
    params: dict,
    how: str = 'scaled',
    key: jax.Array | None = None,
    prunable: Callable[[tuple[str, ...], jax.Array], bool] = is_kernel,
) -> dict:
    """Returns an importance score for every weight of every prunable leaf of `params`.

    how: a name of SCORE_INITS. `scaled` is sqrt(6 / fan_in) * W / max|W|; the others are random,
    with the ReLU gain, and need `key`. A score of exactly 0 gets no gradient: `scaled` never
    revives a weight that is 0.
    Raises ValueError when nothing is prunable, a random `how` comes without a key, or `params` is
    the whole variables dict.
    """
    if 'params' in params:
        raise ValueError("params holds the whole variables: pass variables['params']")
    init = lookup(SCORE_INITS, how, 'score init')
    if how != 'scaled' and key is None:
        raise ValueError(f'score init {how!r} is random: pass key=jax.random.key(seed)')
    kernels = {path: leaf for path, leaf in flatten_dict(params).items() if prunable(path, leaf)}
    if not kernels:
        raise ValueError("no prunable parameter: expected leaves named 'kernel', or pass prunable=")

    def leaf_key(path):  # from the name, so that adding a layer leaves the others' scores alone
        return None if key is None else jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))

    return unflatten_dict({path: init(kernel, leaf_key(path)) for path, kernel in kernels.items()})


def snip_scores(
    loss: Callable[[dict], jax.Array],
    params: dict,
    prunable: Callable[[tuple[str, ...], jax.Array], bool] = is_kernel,
) -> dict:
    """Returns |W * dloss/dW| of every prunable weight: SNIP's connection sensitivity (Lee et al.
    2019, Equation 6), which their paper ranks over the network and `topk_masks` layer by layer.

    loss: parameters -> scalar, on a batch of training images. Raises ValueError when nothing is
    prunable.
    """
    gradients = flatten_dict(jax.grad(loss)(params))
    kernels = {path: leaf for path, leaf in flatten_dict(params).items() if prunable(path, leaf)}
    if not kernels:
        raise ValueError("no prunable parameter: expected leaves named 'kernel', or pass prunable=")
    return unflatten_dict({path: jnp.abs(leaf * gradients[path]) for path, leaf in kernels.items()})


def kept_count(size: int, density: float) -> int:
    """Number of weights kept of `size` at `density` in (0, 1], by the original's rule.

    The fraction is truncated in Python floats, never rounded and never float32.
    """
    if not 0 < density <= 1:
        raise ValueError(f'density is {density}: expected the kept fraction, above 0 and at most 1')
    return size - int((1 - density) * size)


def _top_k_mask(magnitudes, k):
    """0/1 mask of the k largest of `magnitudes` (>= 0); among equals the lower flat index wins.

    The bit patterns of non-negative floats are ordered as integers, so the k-th largest value is
    found by bisection on its bits: one counting pass per bit, whatever the density (`lax.top_k`
    slows down as k grows, a sort is ten times dearer), and exact where values are equal.
    """
    bits = jnp.finfo(magnitudes.dtype).bits
    patterns = jax.lax.bitcast_convert_type(magnitudes.ravel(), jnp.dtype(f'int{bits}'))

    def set_bit(i, threshold):
        candidate = threshold | (jnp.ones((), patterns.dtype) << (bits - 2 - i))
        return jnp.where(jnp.sum(patterns >= candidate) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, bits - 1, set_bit, jnp.zeros((), patterns.dtype))
    above, equal = patterns > threshold, patterns == threshold
    room = k - jnp.sum(above)

    def first(equal):
        return equal & (jnp.cumsum(equal) <= room)

    def where_needed(equal):
        # On CPU the running sum takes as long as the bisection, and seldom have equals to compete.
        # Elsewhere a condition would make the host wait.
        return jax.lax.cond(jnp.sum(equal) == room, lambda equal: equal, first, equal)

    mask = above | jax.lax.platform_dependent(equal, cpu=where_needed, default=first)
    return mask.reshape(magnitudes.shape).astype(magnitudes.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _straight_through(scores, k):
    return _top_k_mask(jnp.abs(scores), k)


@_straight_through.defjvp
def _straight_through_jvp(k, primals, tangents):
    # Not the derivative of jnp.abs: at 0 that is 1, and the original's sign is 0.
    return _straight_through(*primals, k), jnp.sign(primals[0]) * tangents[0]


def topk_masks(scores: dict, density: float) -> dict:
    """Returns 0/1 masks that keep, in each layer, the `density` fraction with the largest |score|.

    Each layer keeps `kept_count(size, density)` weights exactly, ties included. The gradient is
    straight-through: identity in the mask, then through the absolute value, on kept and pruned
    entries alike, so dL/dscore = dL/dW_eff * W * sign(score), where sign(0) = 0.
    """
    return jax.tree.map(
        lambda leaf: _straight_through(leaf, kept_count(leaf.size, density)), scores
    )


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


def sparsity(variables: dict) -> dict[str, dict[str, int | float]]:
    """Returns kept and prunable weights per layer, and under 'total' for the network.

    Each entry is {'kept', 'prunable', 'density'}, keyed by the layer's path joined with '/'.
    Without masks every kernel counts as kept.
    """
    if 'masks' in variables:
        masks = flatten_dict(variables['masks'])
        counts = {'/'.join(p[:-1]): (int(m.astype(bool).sum()), m.size) for p, m in masks.items()}
    else:
        params = flatten_dict(variables['params'])
        counts = {
            '/'.join(p[:-1]): (leaf.size, leaf.size)
            for p, leaf in params.items()
            if is_kernel(p, leaf)
        }
    counts['total'] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return {
        layer: {'kept': kept, 'prunable': size, 'density': kept / size}
        for layer, (kept, size) in counts.items()
    }
