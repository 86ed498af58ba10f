"""A network under evaluation, with the images it is evaluated on."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from robustprune_jax.data import Split
from robustprune_jax.evaluation.records import recorded
from robustprune_jax.runtime import sharding


class Subject(NamedTuple):
    """A network under evaluation: on the host and, once for all batches, on the devices; `header`
    and `folder` are of its per-example files."""

    name: str
    network: Partial
    placed: Partial
    mesh: Mesh
    key: jax.Array
    test: Split
    header: dict
    folder: Path

    @property
    def count(self) -> int:
        return len(self.test.labels)

    def record(
        self,
        evaluation: str,
        settings: dict,
        measure: Callable,
        at_once: int | None = None,
        wanted: np.ndarray | None = None,
    ) -> list[dict]:
        """Returns the lines of an evaluation for the wanted images, by default all."""
        return recorded(
            self.folder / f'{self.name}.{evaluation}.jsonl',
            {**self.header, **settings},
            measure,
            self.test,
            np.arange(self.count) if wanted is None else wanted,
            at_once or self.header['batch_size'],
        )


def subject_of(
    config: ConfigDict, name: str, network: Partial, test: Split, folder: Path
) -> Subject:
    """Returns the Subject of a network and the first config.evaluate.examples test images."""
    count = min(config.evaluate.examples or len(test.labels), len(test.labels))
    fingerprint = 0
    for leaf in jax.tree.leaves(network):
        fingerprint = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), fingerprint)
    mesh = sharding.make_mesh()
    return Subject(
        name=name,
        network=network,
        placed=sharding.put(network, sharding.replicated(mesh)),
        mesh=mesh,
        key=jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b'evaluate')),
        test=Split(test.images[:count], test.labels[:count]),
        header={
            'network': name,
            'fingerprint': f'{fingerprint:08x}',
            'dataset': config.dataset.name,
            'seed': config.seed,
            'batch_size': config.evaluate.batch_size,
        },
        folder=folder,
    )


def mine(batch: dict) -> np.ndarray:
    """Returns which images of a batch are this process's, where each has images of its own."""
    images = np.flatnonzero(batch['mask'])
    return np.array_split(images, jax.process_count())[jax.process_index()]
