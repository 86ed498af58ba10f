"""The train state: what one step reads and writes."""

from typing import Any

import jax
from flax import struct
from jax.sharding import Mesh

from robustprune_jax.runtime.sharding import put, replicated, sharded


@struct.dataclass
class TrainState:
    """What one step reads and writes.

    first_nan is the first step whose loss or update was not finite, -1 while there is none: it
    stays on the device, so that no step waits for the host. average: the averaged collections, {}
    where none are. teacher: the network whose soft labels are learned, {} where none is; not saved.
    """

    step: jax.Array
    variables: dict[str, Any]
    optimizer: Any
    carry: Any
    first_nan: jax.Array
    average: dict[str, Any]
    teacher: dict[str, Any]


def place(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the state on the devices: its carry split like a batch, everything else whole."""
    carry = put(state.carry, sharded(mesh))
    return put(state.replace(carry=()), replicated(mesh)).replace(carry=carry)
