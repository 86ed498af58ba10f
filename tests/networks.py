"""Networks that several rooms' tests look at."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from robustprune_jax.models.layers import batch_norm


class Mixed(nn.Module):
    """What channels can be coupled by: depthwise and grouped convolutions, a stream, a gate."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name='conv')((images - 0.5) / 0.2))
        y = nn.Conv(12, (3, 3), feature_group_count=6, use_bias=False, name='depthwise')(x)
        y = nn.BatchNorm(use_running_average=not train, name='norm')(y)
        y = nn.Conv(12, (1, 1), feature_group_count=4, name='grouped')(nn.gelu(y))
        x = jnp.concatenate([y, nn.Conv(5, (1, 1), name='branch')(x)], axis=-1)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        gate = nn.relu(nn.Dense(3, name='gate1')(x.mean(axis=(1, 2))))
        gate = nn.sigmoid(nn.Dense(17, name='gate2')(gate))
        x = nn.max_pool(x * gate[:, None, None], (2, 2), (2, 2))
        return nn.Dense(4, name='head')(x.reshape(len(x), -1))


class Banded(nn.Module):
    """A convolution, BatchNorm and a dense layer, which see where an image is bright."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (4, 4), strides=4, name='conv')(images)
        x = nn.relu(batch_norm(x, train, 'bn'))
        return nn.Dense(self.num_classes, name='head')(x.reshape(len(x), -1))


def drawn(module, image_shape):
    """Variables with statistics and biases as training leaves them: none is 0 or 1."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return rng.normal(0, spread, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def dense_relu(weights, images):
    """The logits of layers (w, b) with relus between them."""
    z = images.reshape(len(images), -1)
    for w, b in weights[:-1]:
        z = jax.nn.relu(z @ w + b)
    w, b = weights[-1]
    return z @ w + b


def random_relu_network(key, sizes, count):
    """dense_relu of random weights, sizes[0] a multiple of 4, and `count` images in [0, 1]."""
    keys = jax.random.split(key, 2 * len(sizes))
    weights = [
        (jax.random.normal(k, (m, n)) / np.sqrt(m), 0.3 * jax.random.normal(b, (n,)))
        for k, b, m, n in zip(keys[::2], keys[1::2], sizes[:-1], sizes[1:], strict=False)
    ]
    images = jax.random.uniform(keys[-1], (count, sizes[0] // 4, 2, 2))
    return Partial(dense_relu, weights), images
