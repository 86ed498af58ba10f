"""What a network predicts, on images as they are and under attack."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from robustprune_jax import attacks
from robustprune_jax.data.augment import to_float
from robustprune_jax.runtime import compiler


@jax.jit
def _predict(network, images):
    return jnp.argmax(network(images), axis=-1)


@compiler.full_precision
def predictions(
    network: Partial,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    attack: dict | None = None,
) -> jax.Array:
    """Returns the predicted classes [B], on the images or under attack.

    images: uint8 [B, H, W, C]; attack: settings of attacks.pgd.
    """
    images = to_float(images)
    if attack:
        images = attacks.pgd(network, key, images, labels, **attack)
    return _predict(network, images)
