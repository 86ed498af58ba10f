"""The worst nearby weights or scores, layer by layer: AWP (Wu et al., NeurIPS 2020) and, of scores,
S2AP."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# What is perturbed: the name of the collection that gradients reach.
SPACES = {'weights': 'params', 'scores': 'scores'}


class Perturbation(NamedTuple):
    """gamma: its size, in parts of a layer's norm, after so many warmup_epochs; space: a name of
    SPACES."""

    gamma: float
    warmup_epochs: float
    space: str


def perturb(tree: dict, gradient: dict, gamma: jax.Array | float) -> dict:
    """Returns nu_l = gamma * ||w_l|| * g_l / ||g_l|| of each leaf; 0 where its gradient is 0.

    One step of steepest ascent, as long as gamma times the layer. tree and gradient: of the same
    paths, both with the masks applied, so that masked weights are not perturbed.
    """

    def ascent(leaf, slope):
        size = jnp.linalg.norm(slope)
        return gamma * jnp.linalg.norm(leaf) * slope / jnp.where(size > 0, size, 1)

    return jax.tree.map(ascent, tree, gradient)
