"""Batches of images in host memory, for training (endless, shuffled) and for evaluation (once)."""

import os
from collections.abc import Iterator
from functools import partial

import grain
import numpy as np

from robustprune_jax.data.encoded import EncodedImages


def train_batches(
    images: np.ndarray | EncodedImages,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    workers: int = 0,
    pseudo: tuple[np.ndarray, np.ndarray] | None = None,
    pseudo_count: int = 0,
) -> grain.DatasetIterator:
    """Iterates {'image': uint8 [b, H, W, C], 'label': int32 [b]} for ever, in a new order each
    epoch.

    Batches run on over the border of epochs, so that all have the same shape. The global batch
    depends on `seed` only; `process` = (index, count) takes its own b = batch_size / count
    examples of it, a contiguous slice, as `jax.make_array_from_process_local_data` expects.

    pseudo: other images and labels, of which each global batch has `pseudo_count`, evenly among
    the rest; they are shuffled, and begin again, by themselves.

    Encoded images are decoded to random-resized crops, in threads of this process or, the same
    batches, in `workers` processes.

    The iterator's position is checkpointable: `get_state`, `set_state`, or give the iterator to
    Orbax v1 as a checkpointable. It depends neither on `process` nor on `workers`.
    """
    index, count = process
    if batch_size % count:
        raise ValueError(f'batch_size={batch_size} does not divide among {count} processes')
    mine = slice(index * batch_size // count, (index + 1) * batch_size // count)
    # Only indices travel through Grain: gathering a whole batch at once from memory is several
    # times faster than a pipeline of single examples.
    order = _order(len(labels), seed, batch_size - pseudo_count)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    if pseudo_count:
        both = [order, _order(len(pseudo[1]), seed + 1, pseudo_count)]
        alike = min(map(len, both))  # endless, but not of one length
        zipped = grain.experimental.ZipMapDataset([one[:alike] for one in both])
        places = _evenly(batch_size - pseudo_count, pseudo_count)[mine]
        gather = partial(_gather_mixed, [(images, labels), pseudo], places)
        return iter(zipped.map(gather).to_iter_dataset(ahead))
    if isinstance(images, np.ndarray):
        return iter(order.map(partial(_gather, images, labels, mine)).to_iter_dataset(ahead))
    decoded = order.random_map(partial(_decode, images, labels, mine))
    if workers:
        return _InProcesses(decoded, workers)
    return iter(decoded.to_iter_dataset(_decoding_threads()))


def _order(count: int, seed: int, batch_size: int) -> grain.MapDataset:
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size)


def _evenly(*counts: int) -> np.ndarray:
    """The places of a batch whose parts, one after the other, are to be spread: so that every
    device gets its part of each."""
    return np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in counts]), kind='stable')


def _gather(images, labels, mine, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {'image': images[indices[mine]], 'label': labels[indices[mine]].astype(np.int32)}


def _gather_mixed(sources, places, indices: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """sources: (images, labels) of each part; places: of what is gathered among both indices."""
    images = sources[0][0]
    other = places >= len(indices[0])
    rows = np.concatenate(indices)[places]
    image = np.empty((len(places), *images.shape[1:]), images.dtype)
    label = np.empty(len(places), np.int32)
    for which, source in zip((~other, other), sources, strict=True):
        image[which], label[which] = (array[rows[which]] for array in source)
    return {'image': image, 'label': label}


def _decode(images, labels, mine, indices: np.ndarray, rng: np.random.Generator):
    seeds = rng.integers(2**63, size=len(indices))[mine]  # drawn for the global batch
    pixels, shown = images.random(indices[mine], seeds)
    return {'image': pixels, 'label': labels[shown].astype(np.int32)}


def _decoding_threads():
    threads = min(os.cpu_count() or 1, 16)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)


class _InProcesses(grain.DatasetIterator):
    """Batches made in worker processes, in their order.

    Grain's own state of such an iterator is one position per worker; here it is the number of
    batches, so that a run can go on with another number of workers, or none.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches, self._workers = batches, workers
        self._next, self._iterator = 0, None

    def __next__(self):
        if self._iterator is None:
            ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            self._iterator = iter(
                self._batches[self._next :]
                .to_iter_dataset(ahead)
                .mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1))
            )
        # Copied, so that the memory shared with the worker is free at once, not at some exit.
        batch = {name: np.array(array) for name, array in next(self._iterator).items()}
        self._next += 1
        return batch

    def get_state(self):
        return {'next_index': self._next}

    def set_state(self, state):
        self.close()
        self._next = state['next_index']

    def close(self):
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def eval_batches(
    images: np.ndarray | EncodedImages, labels: np.ndarray, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates {'image', 'label', 'mask'} over all examples in order, each once.

    Encoded images are decoded to their central squares, ahead in threads. All batches have
    batch_size examples: the last one is filled up with zeros, where the mask (bool [batch_size])
    is False.
    """

    def cut(first: int) -> dict[str, np.ndarray]:
        part = slice(first, first + batch_size)
        real = len(labels[part])

        def pad(array: np.ndarray) -> np.ndarray:
            return np.pad(array, [(0, batch_size - real)] + [(0, 0)] * (array.ndim - 1))

        return {
            'image': pad(np.asarray(images[part])),
            'label': pad(labels[part].astype(np.int32)),
            'mask': np.arange(batch_size) < real,
        }

    firsts = grain.MapDataset.range(0, len(labels), batch_size)
    return iter(firsts.map(cut).to_iter_dataset(_decoding_threads()))
