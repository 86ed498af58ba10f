"""Data parallelism by `jax.jit` over a one-axis mesh: same numbers on one device and on many."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `devices`, by default all of all processes, one axis 'data'.

    In the order of the processes: their parts of a batch, one after the other, are the batch.
    """
    devices = jax.devices() if devices is None else devices
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    # Explicit axis types break per-example crops and sorts.
    return Mesh(np.array(in_order), ('data',), axis_types=(AxisType.Auto,))


def check_batch_size(batch_size: int, field: str, parts: int = 1) -> None:
    """Raises ValueError when a global batch cannot be divided over the devices, in `parts` each."""
    devices = jax.device_count()
    shares = devices * parts
    if batch_size < 1 or batch_size % shares:
        nearest = max(shares, round(batch_size / shares) * shares)
        of_each = f' in {parts} parts each (config.accumulate)' if parts > 1 else ''
        raise ValueError(
            f'{field} is {batch_size}: expected a multiple of {shares}, for {devices} devices'
            f'{of_each}; nearest: {nearest}'
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole: state, metrics, keys."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what is split over the devices: images, labels, a carry."""
    return NamedSharding(mesh, PartitionSpec('data'))


def put(tree, sharding: NamedSharding):
    """Returns the arrays of a pytree that every process holds whole, on the devices."""

    def one(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree)


def shard_batch(mesh: Mesh, batch: dict) -> dict:
    """Returns the global batch, split over the devices, from this process's part of it."""
    return {
        name: jax.make_array_from_process_local_data(sharded(mesh), array)
        for name, array in batch.items()
    }
