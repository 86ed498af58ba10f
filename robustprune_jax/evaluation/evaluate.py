"""Accuracy on held-out images, clean, attacked and certified, recorded example by example."""

import json
import os
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from ml_collections import ConfigDict
from tqdm import tqdm

from robustprune_jax import attacks, smoothing
from robustprune_jax.bounds import margins
from robustprune_jax.config import certificates
from robustprune_jax.data import Split
from robustprune_jax.data.augment import to_float
from robustprune_jax.data.batches import eval_batches
from robustprune_jax.evaluation.predictions import predictions
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning.masks import sparsity
from robustprune_jax.runtime import distributed, sharding
from robustprune_jax.runtime.files import differences, naming, read_jsonl, write_atomically


def evaluate(
    config: ConfigDict, name: str, module: linen.Module, variables: dict, test: Split, workdir: Path
) -> dict:
    """Returns one entry of result.json's `networks`: accuracies in [0, 1], kept weights.

    Writes workdir/examples/<name>.<evaluation>.jsonl: the settings, then one line per example.
    What such a file already holds is not computed again. Raises ValueError when it comes from
    other settings or another network.

    Bounds form a cascade over the ball of config.evaluate.pgd: the first of
    config.evaluate.certified.methods sees every image, each later one those that neither the ones
    before verified nor PGD broke. An image counts as verified by a method when, margin by margin,
    the largest bound of that and the methods before is positive.

    With config.evaluate.attack 'standard' the ensemble of attacks.standard follows PGD, in the same
    ball: a line has the attack that broke the image, 'clean' if it needed none, '' if it stands.

    Smoothing certifies the first config.evaluate.smooth.examples images: a line has the smoothed
    classifier's prediction, -1 where it abstains, and the radius.
    """
    settings = config.evaluate
    count = min(settings.examples or len(test.labels), len(test.labels))
    test = Split(test.images[:count], test.labels[:count])
    network = logits_fn(module, variables)
    fingerprint = 0
    for leaf in jax.tree.leaves(network):
        fingerprint = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), fingerprint)
    header = {
        'network': name,
        'fingerprint': f'{fingerprint:08x}',
        'dataset': config.dataset.name,
        'seed': config.seed,
        'batch_size': settings.batch_size,
    }
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b'evaluate'))
    mesh = sharding.make_mesh()
    placed = sharding.put(network, sharding.replicated(mesh))  # once, not with every batch

    def record(evaluation, evaluation_settings, measure, wanted, at_once=settings.batch_size):
        path = workdir / 'examples' / f'{name}.{evaluation}.jsonl'
        return _recorded(path, {**header, **evaluation_settings}, measure, test, wanted, at_once)

    def is_right(evaluation, attack):
        def predict(batch, first):
            batch = sharding.put(batch, sharding.sharded(mesh))
            batch_key = jax.random.fold_in(key, first)
            found = predictions(placed, batch_key, batch['image'], batch['label'], attack)
            return {'prediction': found}

        lines = record(evaluation, attack or {}, predict, np.arange(count))
        return np.array([line['label'] == line['prediction'] for line in lines])

    pgd = dict(settings.pgd)
    clean, attacked = is_right('clean', None), is_right('pgd', pgd)
    stands = clean & attacked
    robust = {'pgd': {'accuracy': float(attacked.mean()), 'examples': count, **pgd}}
    methods, ball = certificates(config), {'eps': pgd['eps'], 'norm': pgd['norm']}
    broken = ~stands
    if settings.attack == 'standard':
        # More images than slots, so that few slots stay empty while the last images are attacked.
        size = settings.batch_size
        broken_by = partial(_broken_by, network, key, ball, size)
        lines = record('standard', ball, broken_by, np.arange(count), 4 * size)
        after = attacks.accuracy_after(np.array([line['broken_by'] for line in lines]))
        robust['standard'] = {
            'accuracy': min(after.values()),
            'examples': count,
            **ball,
            'after': after,
        }
        broken |= np.array([line['broken_by'] != '' for line in lines])
    verified = np.zeros(count, bool)
    for i, method in enumerate(methods):
        bound = partial(
            _least_margin, placed, mesh, methods[: i + 1], ball, settings.certified.memory_gb
        )
        wanted = np.flatnonzero(stands & ~verified) if i else np.arange(count)
        before = {'after': methods[:i], 'pgd': pgd} if i else {'after': []}  # what chose `wanted`
        lines = record(method, {**ball, **before}, bound, wanted)
        verified[[line['index'] for line in lines if line['margin'] > 0]] = True
        robust[method] = {'accuracy': float(verified.mean()), 'examples': count, **ball}
    if methods:
        fooled = np.flatnonzero(verified & broken)
        if len(fooled):
            raise AssertionError(
                f'{name}: test images {fooled[:5].tolist()} are verified and misclassified under '
                'attack: a bound is not sound; please report it'
            )
        robust[methods[-1]] |= {
            'attacked': float(np.mean(~stands)),
            'undecided': float(np.mean(stands & ~verified)),
        }
    if settings.smooth.examples:
        robust['smooth'] = _certified_radii(settings.smooth, placed, key, record, count)
    total = sparsity(variables)['total']
    return {
        'name': name,
        'kept': total['kept'],
        'prunable': total['prunable'],
        'clean_accuracy': float(clean.mean()),
        'examples': count,
        'robust': robust,
    }


def _broken_by(network, key, ball, batch_size, batch, first):
    """The attack of the standard ensemble that broke each image."""
    # The ensemble uses the devices of its process: each process attacks images of its own.
    mine = np.array_split(np.flatnonzero(batch['mask']), jax.process_count())[jax.process_index()]
    broken_by = np.array([], str)
    if len(mine):
        _, broken_by = attacks.in_order(
            network,
            key,
            to_float(batch['image'][mine]),
            batch['label'][mine],
            batch_size=batch_size,
            first=first + int(mine[0]),
            **ball,
        )
    return {'broken_by': np.concatenate(distributed.exchange(broken_by.tolist()))}


def _certified_radii(settings: ConfigDict, network, key, record, count: int) -> dict:
    """Returns the entry of randomized smoothing."""
    sampling = {name: settings[name] for name in ('sigma', 'n0', 'n', 'alpha')}
    count = min(settings.examples, count)

    def certify(batch, first):
        prediction, radius = smoothing.certify(
            network,
            key,
            to_float(batch['image']),
            batch_size=settings.batch_size,
            num_classes=jax.eval_shape(network, to_float(batch['image'])).shape[-1],
            first=first,
            **sampling,
        )
        return {'prediction': prediction, 'radius': radius}

    images_at_once = max(1, settings.batch_size // (settings.n0 + settings.n))
    lines = record('smooth', sampling, certify, np.arange(count), images_at_once)
    right = np.array([line['label'] == line['prediction'] for line in lines])
    radius = np.array([line['radius'] for line in lines])
    return {
        **sampling,
        'examples': count,
        'acr': float(np.mean(right * radius)),
        'abstention': float(np.mean([line['prediction'] == smoothing.ABSTAIN for line in lines])),
        'certified_accuracy': {
            f'{r:g}': float(np.mean(right & (radius >= r))) for r in settings.radii
        },
    }


def _least_margin(network, mesh, methods, ball, memory_gb, batch, first):
    """The least margin of each image, of each margin the largest bound."""
    batch = sharding.put(batch, sharding.sharded(mesh))
    images, labels = to_float(batch['image']), batch['label']
    lower = -jnp.inf
    for method in methods:
        bounds = margins(network, images, labels, method=method, memory_gb=memory_gb, **ball)
        lower = jnp.maximum(lower, bounds)
    own = jax.nn.one_hot(labels, lower.shape[-1], dtype=bool)
    return {'margin': jnp.min(jnp.where(own, jnp.inf, lower), axis=-1)}


def _recorded(
    path: Path,
    header: dict,
    measure: Callable[[dict, int], dict[str, jax.Array]],
    test: Split,
    wanted: np.ndarray,
    size: int,
) -> list[dict]:
    """Returns path's lines for the wanted examples, after adding those that are missing.

    measure(batch of `size` images, place of its first in `wanted`) -> {field: [B]}.
    """
    writes = jax.process_index() == 0
    (lines, *_) = distributed.exchange(read_jsonl(path) if writes else None)
    if lines and lines[0] != header:
        found = '; '.join(differences(lines[0], header))
        raise ValueError(
            f'{path} holds an evaluation with other settings ({found}): move it away to redo it'
        )
    done = {line['index']: line for line in lines[1:] if 'index' in line}
    # Whole batches are kept, so that an interrupted evaluation draws the same starts.
    batches = {first: wanted[first : first + size] for first in range(0, len(wanted), size)}
    missing = {first: rows for first, rows in batches.items() if not set(rows) <= done.keys()}
    if not missing:
        return [done[index] for index in wanted]
    rows = np.concatenate(list(missing.values()))
    for index in rows.tolist():
        done.pop(index, None)
    if writes:
        kept = [header, *done.values()]
        write_atomically(path, ''.join(json.dumps(line) + '\n' for line in kept))
    with (
        (path if writes else Path(os.devnull)).open('a') as file,
        tqdm(
            desc=path.stem,
            total=len(wanted),
            initial=len(wanted) - len(rows),
            unit='image',
            disable=None if writes else True,  # None: shown on a terminal only
        ) as bar,
    ):
        todo = eval_batches(test.images[rows], test.labels[rows], size)
        for (first, indices), batch in zip(missing.items(), todo, strict=True):
            fields = distributed.gather(measure(batch, first))
            for i, index in enumerate(indices.tolist()):
                line = {'index': index, 'label': int(batch['label'][i])}
                done[index] = line | {field: value[i].item() for field, value in fields.items()}
            with naming(path):
                file.writelines(json.dumps(done[index]) + '\n' for index in indices.tolist())
                file.flush()
            bar.update(len(indices))
            if distributed.preempted():
                sys.exit(0)
    return [done[index] for index in wanted]
