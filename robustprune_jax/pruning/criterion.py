"""How much each weight matters at the start: the scores that masks are chosen by."""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

from robustprune_jax.runtime.registry import lookup

Kernels = dict[tuple[str, ...], jax.Array]  # by their path in params


class Criterion(NamedTuple):
    """scores: (kernels, key, loss) -> their scores; needs: which of 'key' and 'loss' it takes."""

    scores: Callable[[Kernels, jax.Array | None, Callable | None], Kernels]
    needs: str = ''


def is_kernel(path: tuple[str, ...], leaf: jax.Array) -> bool:
    """True for the kernels of conv and dense layers; never for biases or normalisation layers."""
    return path[-1] == 'kernel' and leaf.ndim >= 2


def scaled(kernels: Kernels, key=None, loss=None) -> Kernels:
    """Returns sqrt(6 / fan_in) * W / max|W| (HYDRA, equation 5).

    They rank as |W| does, so the first mask is that of least weight magnitude (LWM). A weight that
    is 0 has the score 0, which gets no gradient: it is never revived.
    """

    def scores(kernel):
        largest, fan_in = jnp.max(jnp.abs(kernel)), math.prod(kernel.shape[:-1])
        return jnp.sqrt(6 / fan_in) * kernel / jnp.where(largest > 0, largest, 1)

    return {path: scores(kernel) for path, kernel in kernels.items()}


def magnitude(kernels: Kernels, key=None, loss=None) -> Kernels:
    """Returns the weights themselves, whose sizes compare over layers."""
    return dict(kernels)


def _drawn(scale, mode, distribution):
    """Random scores, with the ReLU gain."""
    draw = jax.nn.initializers.variance_scaling(scale, mode, distribution)

    def scores(kernels, key, loss=None):
        # A key from the name, so that adding a layer leaves the others' scores alone.
        keys = {
            path: jax.random.fold_in(key, zlib.crc32('/'.join(path).encode())) for path in kernels
        }
        return {path: draw(keys[path], w.shape, w.dtype) for path, w in kernels.items()}

    return Criterion(scores, needs='key')


@jax.jit
def _sensitivity(kernels, loss):
    gradients = jax.grad(loss)(kernels)
    return {path: jnp.abs(kernel * gradients[path]) for path, kernel in kernels.items()}


def snip(kernels: Kernels, key, loss: Callable) -> Kernels:
    """Returns |W * dloss/dW|: SNIP's connection sensitivity (Lee et al. 2019, Equation 6)."""
    return _sensitivity(kernels, loss)


@jax.jit
def _flow(kernels, loss):
    gradient = jax.grad(loss)
    slope = gradient(kernels)

    def along_slope(kernels):
        found = gradient(kernels)
        return sum(jnp.vdot(found[path], slope[path]) for path in kernels)

    bent = jax.grad(along_slope)(kernels)
    flow = {path: kernel * bent[path] for path, kernel in kernels.items()}
    least = jnp.min(jnp.stack([jnp.min(leaf) for leaf in flow.values()]))
    return {path: leaf - least for path, leaf in flow.items()}


def grasp(kernels: Kernels, key, loss: Callable) -> Kernels:
    """Returns W * (H g), what a weight adds to the gradient's norm, less the smallest of them.

    GraSP (Wang et al. 2020, Equation 8), where H and g are the loss's Hessian and gradient.
    """
    return _flow(kernels, loss)


CRITERIA: dict[str, Criterion] = {
    'scaled': Criterion(scaled),
    'magnitude': Criterion(magnitude),
    'kaiming_uniform': _drawn(2.0, 'fan_in', 'uniform'),
    'kaiming_normal': _drawn(2.0, 'fan_in', 'normal'),
    'xavier_uniform': _drawn(2.0, 'fan_avg', 'uniform'),
    'xavier_normal': _drawn(2.0, 'fan_avg', 'normal'),
    'snip': Criterion(snip, needs='loss'),
    'grasp': Criterion(grasp, needs='loss'),
}
_GIVE = {
    'key': 'is random: pass key=jax.random.key(seed)',
    'loss': 'looks at data: pass loss=, parameters -> scalar on a batch of training images',
}


def init_scores(
    params: dict,
    how: str = 'scaled',
    key: jax.Array | None = None,
    prunable: Callable[[tuple[str, ...], jax.Array], bool] = is_kernel,
    loss: Callable[[dict], jax.Array] | None = None,
) -> dict:
    """Returns an importance score for every weight of every prunable leaf of `params`.

    how: a name of CRITERIA; random ones need `key`, `snip` and `grasp` need `loss`: parameters ->
    scalar, on a batch of training images.
    Raises ValueError when nothing is prunable, when key or loss is needed and not given, or
    `params` is the whole variables dict.
    """
    if 'params' in params:
        raise ValueError("params holds the whole variables: pass variables['params']")
    criterion = lookup(CRITERIA, how, 'criterion')
    if criterion.needs and {'key': key, 'loss': loss}[criterion.needs] is None:
        raise ValueError(f'criterion {how!r} {_GIVE[criterion.needs]}')
    flat = flatten_dict(params)
    kernels = {path: leaf for path, leaf in flat.items() if prunable(path, leaf)}
    if not kernels:
        raise ValueError("no prunable parameter: expected leaves named 'kernel', or pass prunable=")
    if loss is not None:
        loss = Partial(_of_kernels, loss if isinstance(loss, Partial) else Partial(loss), flat)
    return unflatten_dict(criterion.scores(kernels, key, loss))


def _of_kernels(loss, flat, kernels):
    return loss(unflatten_dict({**flat, **kernels}))
