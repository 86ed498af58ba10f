"""What a phase may add to the loss of any objective: sparse weights, stable ReLUs, bounds that
do not widen from layer to layer.

The last three are of the interval bounds l, u of every ReLU's input over the ball of the ramp's
eps, with the center c = (l + u) / 2 and the radius (u - l) / 2.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from ml_collections import ConfigDict

from robustprune_jax.bounds import intermediate
from robustprune_jax.objectives.objective import Objective, eval_logits
from robustprune_jax.objectives.ramps import fraction

Layers = list[tuple[jax.Array, jax.Array]]  # the bounds l, u of each ReLU's input, [B, ...]

TAU = 0.5  # Shi et al.'s tolerance: ratios down to it cost nothing
TINY = 1e-12


def penalised(objective: Objective, section: ConfigDict, certified: ConfigDict) -> Objective:
    """Returns the objective with the weighted penalties of a phase in its loss.

    section: the phase's; its weights l1, nrs, l_tight and l_relu. Those of the last two fall from
    the ramp's beginning to 0 at its end (Shi et al.: 1 - eps / eps_max), after which they cost
    nothing. certified: config.certified (eps, ramp).
    """
    warms_up = section.l_tight or section.l_relu
    if not (section.l1 or section.nrs or warms_up):
        return objective

    def loss(logits_of, carry, batch, key, progress):
        total, rest = objective.loss(logits_of, carry, batch, key, progress)
        risen = fraction(certified.ramp, progress)
        images, eps = batch['image'], risen * certified.eps

        def of_bounds():
            layers = relu_inputs(eval_logits(logits_of), images, eps)
            start = section.l_tight * tightness(layers, box_radius(images, eps))
            start += section.l_relu * balance(layers)
            return section.nrs * instability(layers) + (1 - risen) * start

        if section.l1:
            total += section.l1 * absolute_weights(logits_of)
        if section.nrs:
            total += of_bounds()
        elif warms_up and progress.ramp_epochs:
            total += jax.lax.cond(risen < 1, of_bounds, lambda: jnp.zeros(()))
        return total, rest

    return objective._replace(loss=loss)


def absolute_weights(network: Partial) -> jax.Array:
    """Returns the sum of the kernels' absolute values; network: over its masked variables."""
    kernels = [leaf for leaf in jax.tree.leaves(network) if jnp.ndim(leaf) > 1]
    return sum(jnp.sum(jnp.abs(kernel)) for kernel in kernels)


def relu_inputs(network: Partial, images: jax.Array, eps: jax.Array) -> Layers:
    """Returns the interval bounds of what goes into each ReLU over the l_inf ball within [0, 1].

    Raises ValueError on a network without any.
    """
    layers = intermediate(network, images, eps=eps, method='ibp')
    found = [(layer.lower, layer.upper) for layer in layers if layer.operation == 'Relu']
    if not found:
        raise ValueError('the network has no relu: nrs, l_tight and l_relu must be 0')
    return found


def box_radius(images: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns the mean radius of a pixel of the ball within [0, 1]."""
    return jnp.mean(jnp.minimum(images + eps, 1) - jnp.maximum(images - eps, 0)) / 2


def instability(layers: Layers) -> jax.Array:
    """Returns NRSLoss, the mean of -tanh(1 + l u) over all ReLU inputs, in (-1, 1).

    Little where few are unstable (l < 0 < u) and those not by much (Li et al. 2023; Xiao et al.
    2019's RS loss).
    """
    signs = [jnp.tanh(1 + lower * upper) for lower, upper in layers]
    return -sum(map(jnp.sum, signs)) / sum(sign.size for sign in signs)


def tightness(layers: Layers, input_radius: jax.Array) -> jax.Array:
    """Returns L_tightness, in [0, 1]: how far the mean radius grows from the image to the layers,
    beyond 1 / TAU times (Shi et al. 2021, equation 7)."""
    radii = jnp.stack([jnp.mean(upper - lower) / 2 for lower, upper in layers])
    ratios = input_radius / jnp.maximum(radii, TINY)
    return jnp.mean(jax.nn.relu(TAU - ratios)) / TAU


def balance(layers: Layers) -> jax.Array:
    """Returns L_relu, in [0, 2]: how unlike active (l > 0) and inactive (u < 0) ReLU inputs are in
    the sums of their centers and of these centers' squared deviations from the layer's mean (Shi et
    al. 2021, equation 8)."""
    return jnp.mean(jnp.stack([_imbalance(*bounds) for bounds in layers]))


def _imbalance(lower, upper):
    center = (lower + upper) / 2
    is_active, is_inactive = lower > 0, upper < 0
    deviations = (center - jnp.mean(center)) ** 2
    costs = 0.0
    for values in (jnp.abs(center), deviations):
        of_active, of_inactive = jnp.sum(values * is_active), jnp.sum(values * is_inactive)
        least, most = jnp.minimum(of_active, of_inactive), jnp.maximum(of_active, of_inactive)
        costs += jax.nn.relu(TAU - least / jnp.maximum(most, TINY)) / TAU
    return costs
