"""Accuracy on held-out images, clean and attacked, recorded example by example."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
from flax import linen
from jax.tree_util import Partial
from ml_collections import ConfigDict
from tqdm import tqdm

from robustprune_jax import sharding
from robustprune_jax.config import differences
from robustprune_jax.data import Split
from robustprune_jax.data.batches import eval_batches
from robustprune_jax.files import read_jsonl, write_atomically
from robustprune_jax.masks import sparsity
from robustprune_jax.step import logits_fn, predictions


def evaluate(
    config: ConfigDict, name: str, module: linen.Module, variables: dict, test: Split, workdir: Path
) -> dict:
    """Returns one entry of result.json's `networks`: accuracies in [0, 1], kept weights.

    Writes workdir/examples/<name>.{clean,pgd}.jsonl: the settings, then one line per example.
    What such a file already holds is not computed again. Raises ValueError when it comes from
    other settings or another network.
    """
    settings = config.evaluate
    count = min(settings.examples or len(test.labels), len(test.labels))
    test = Split(test.images[:count], test.labels[:count])
    network = logits_fn(module, variables)
    fingerprint = 0
    for leaf in jax.tree.leaves(network):
        fingerprint = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), fingerprint)
    total = sparsity(variables)['total']

    def accuracy(evaluation, attack):
        path = workdir / 'examples' / f'{name}.{evaluation}.jsonl'
        header = {
            'network': name,
            'fingerprint': f'{fingerprint:08x}',
            'dataset': config.dataset.name,
            'seed': config.seed,
            'batch_size': settings.batch_size,
            **(attack or {}),
        }
        return _recorded_accuracy(path, header, network, test, attack, config.seed)

    clean = accuracy('clean', None)
    pgd = dict(settings.pgd)
    return {
        'name': name,
        'kept': total['kept'],
        'prunable': total['prunable'],
        'clean_accuracy': clean,
        'examples': count,
        'robust': {'pgd': {'accuracy': accuracy('pgd', pgd), 'examples': count, **pgd}},
    }


def _recorded_accuracy(
    path: Path, header: dict, network: Partial, test: Split, attack: dict | None, seed: int
) -> float:
    """The accuracy over path's lines, after adding those that are missing."""
    lines = read_jsonl(path)
    if lines and lines[0] != header:
        found = '; '.join(differences(lines[0], header))
        raise ValueError(
            f'{path} holds an evaluation with other settings ({found}): move it away to redo it'
        )
    size = header['batch_size']
    done = lines[1:] if lines else []
    # Whole batches are kept, so that an interrupted evaluation draws the same starts.
    done = done[: len(done) // size * size if len(done) < len(test.labels) else len(test.labels)]
    if len(done) < len(test.labels):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ''.join(json.dumps(line) + '\n' for line in [header, *done]))
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b'evaluate'))
        mesh = sharding.make_mesh()
        with (
            path.open('a') as file,
            tqdm(
                desc=path.stem,
                total=len(test.labels),
                initial=len(done),
                unit='image',
                disable=None,
            ) as bar,
        ):
            for batch in eval_batches(*test, size, start=len(done)):
                first = len(done)
                placed = sharding.shard_batch(mesh, batch)
                predicted = np.asarray(
                    predictions(
                        network,
                        jax.random.fold_in(key, first),
                        placed['image'],
                        placed['label'],
                        attack,
                    )
                )
                done += [
                    {'index': first + i, 'label': int(label), 'prediction': int(prediction)}
                    for i, (label, prediction) in enumerate(
                        zip(batch['label'][batch['mask']], predicted[batch['mask']], strict=True)
                    )
                ]
                file.writelines(json.dumps(line) + '\n' for line in done[first:])
                file.flush()
                bar.update(len(done) - first)
    return float(np.mean([line['label'] == line['prediction'] for line in done]))
