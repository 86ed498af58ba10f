"""Batches of images in host memory, for training (endless, shuffled) and for evaluation (once)."""

from collections.abc import Iterator

import grain
import numpy as np


def train_batches(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Iterates {'image': uint8 [b, H, W, C], 'label': int32 [b]} for ever, in a new order each
    epoch.

    Batches run on over the border of epochs, so that all have the same shape. The global batch
    depends on `seed` only; `process` = (index, count) takes its own b = batch_size / count
    examples of it, a contiguous slice, as `jax.make_array_from_process_local_data` expects.

    The iterator's position is checkpointable: `get_state`, `set_state`, or give the iterator to
    Orbax v1 as a checkpointable.
    """
    index, count = process
    if batch_size % count:
        raise ValueError(f'batch_size={batch_size} does not divide among {count} processes')
    mine = slice(index * batch_size // count, (index + 1) * batch_size // count)

    def gather(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {'image': images[indices[mine]], 'label': labels[indices[mine]].astype(np.int32)}

    # Only indices travel through Grain: gathering a whole batch at once from memory is several
    # times faster than a pipeline of single examples.
    order = grain.MapDataset.range(len(labels)).seed(seed).shuffle().repeat().batch(batch_size)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(order.map(gather).to_iter_dataset(ahead))


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, *, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates {'image', 'label', 'mask'} over examples start, start + 1, ... in order, each once.

    All batches have batch_size examples: the last one is filled up with zeros, where the mask
    (bool [batch_size]) is False. An evaluation that was interrupted goes on at a `start` that is
    a multiple of batch_size with the very batches it would have seen.
    """
    for first in range(start, len(labels), batch_size):
        part = slice(first, first + batch_size)
        real = len(labels[part])

        def pad(array: np.ndarray, fill: int = batch_size - real) -> np.ndarray:
            return np.pad(array, [(0, fill)] + [(0, 0)] * (array.ndim - 1))

        yield {
            'image': pad(images[part]),
            'label': pad(labels[part].astype(np.int32)),
            'mask': np.arange(batch_size) < real,
        }
