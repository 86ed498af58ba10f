"""The initial distributions of the PyTorch networks, as Flax initialisers.

Kernels are HWIO (convolutions) or [in, out] (dense layers). `fan_in` counts the inputs of one
output unit, in_channels * kernel area; `fan_out` is out_channels * kernel area. A bias initialiser
here is a function of the layer's fan_in, because PyTorch's default draws biases from it.
"""

import math

import jax
import jax.numpy as jnp
from flax.linen import initializers

kaiming_normal = initializers.variance_scaling(2.0, 'fan_out', 'normal')  # N(0, 2 / fan_out)
kaiming_uniform = initializers.variance_scaling(2.0, 'fan_out', 'uniform')  # +-sqrt(6 / fan_out)
torch_default = initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # U(+-1 / sqrt(fan_in))
small_normal = initializers.normal(0.01)


def bounds_normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Returns N(0, 2 pi / fan_in ** 2): interval bounds keep their mean width from layer to layer
    (Shi et al. 2021, section 3.2)."""
    return jax.random.normal(key, shape, dtype) * (math.sqrt(2 * math.pi) / math.prod(shape[:-1]))


def signed_constant(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Returns +-sqrt(2 / fan_in), the sign of every entry drawn at random."""
    return jax.random.rademacher(key, shape, dtype) * math.sqrt(2 / math.prod(shape[:-1]))


def zero_bias(fan_in: int):
    """Returns the initialiser of biases that start at zero, whatever the fan_in."""
    del fan_in
    return initializers.zeros_init()


def torch_default_bias(fan_in: int):
    """Returns the initialiser that draws biases from U(+-1 / sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
