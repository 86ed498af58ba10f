"""What attacks leave of a network, image by image."""

import jax
import numpy as np
from ml_collections import ConfigDict

from robustprune_jax import attacks
from robustprune_jax.data.augment import to_float
from robustprune_jax.evaluation.predictions import predictions
from robustprune_jax.evaluation.subject import Subject, mine
from robustprune_jax.runtime import distributed, sharding


def is_right(subject: Subject, evaluation: str, attack: dict | None) -> np.ndarray:
    """Which images are classified rightly, as they are or under PGD, bool [N]."""

    def predict(batch, first):
        batch = sharding.put(batch, sharding.sharded(subject.mesh))
        key = jax.random.fold_in(subject.key, first)
        found = predictions(subject.placed, key, batch['image'], batch['label'], attack)
        return {'prediction': found}

    lines = subject.record(evaluation, attack or {}, predict)
    return np.array([line['label'] == line['prediction'] for line in lines])


def under_ensemble(subject: Subject, pgd: dict, name: str) -> tuple[dict, np.ndarray]:
    """Returns the entry of an ensemble of attacks.ENSEMBLES in the ball of `pgd`, and which images
    it broke, bool [N]."""
    ball, size = {'eps': pgd['eps'], 'norm': pgd['norm']}, subject.header['batch_size']
    order = attacks.ENSEMBLES[name]

    def broken_by(batch, first):
        # The ensemble uses the devices of its process: each process attacks images of its own.
        own, found = mine(batch), np.array([], str)
        if len(own):
            _, found = attacks.in_order(
                subject.network,
                subject.key,
                to_float(batch['image'][own]),
                batch['label'][own],
                attacks=order,
                batch_size=size,
                first=first + int(own[0]),
                **ball,
            )
        return {'broken_by': np.concatenate(distributed.exchange(found.tolist()))}

    # More images than slots, so that few slots stay empty while the last images are attacked.
    lines = subject.record(name, ball, broken_by, at_once=4 * size)
    names = np.array([line['broken_by'] for line in lines])
    after = attacks.accuracy_after(names, order)
    entry = {'accuracy': min(after.values()), 'examples': subject.count, **ball, 'after': after}
    return entry, names != ''


def distances(subject: Subject, settings: ConfigDict, pgd: dict) -> tuple[dict, np.ndarray]:
    """Returns the entry of the minimum-norm attack on the first settings.examples images, and how
    far it found each image from a misclassified one, [N], infinite where it did not look."""
    attack = {name: settings[name] for name in ('norm', 'steps', 'loss')}
    count = min(settings.examples, subject.count)

    def measure(batch, first):
        own, found = mine(batch), np.array([])
        if len(own):
            images, labels = to_float(batch['image'][own]), batch['label'][own]
            size = subject.header['batch_size']
            _, found = attacks.fmn(subject.network, images, labels, batch_size=size, **attack)
        return {'distance': np.concatenate(distributed.exchange(found.tolist()))}

    lines = subject.record('distances', attack, measure, wanted=np.arange(count))
    found = np.array([line['distance'] for line in lines])
    radii = sorted({*settings.radii, *([pgd['eps']] if attack['norm'] == pgd['norm'] else [])})
    median = float(np.median(found))
    entry = {
        **attack,
        'examples': count,
        'median': median if np.isfinite(median) else None,
        'accuracy_at': {f'{radius:g}': float(np.mean(found > radius)) for radius in radii},
    }
    return entry, np.pad(found, (0, subject.count - count), constant_values=np.inf)
