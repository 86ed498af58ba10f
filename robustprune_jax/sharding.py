"""Data parallelism by `jax.jit` over a one-axis mesh: same numbers on one device and on many."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `devices`, by default all of all processes, one axis 'data'."""
    devices = jax.devices() if devices is None else devices
    # The default axis type, Explicit, breaks per-example crops and sorts.
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(batch_size: int, field: str) -> None:
    """Raises ValueError when a global batch cannot be divided over the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        nearest = max(devices, round(batch_size / devices) * devices)
        raise ValueError(
            f'{field} is {batch_size}: not divisible by the {devices} devices; nearest: {nearest}'
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole: state, metrics, keys."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh: Mesh, batch: dict) -> dict:
    """Returns the global batch, split over the devices, from this process's part of it."""
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
