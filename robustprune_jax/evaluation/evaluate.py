"""Accuracy on held-out images, clean, attacked and certified, recorded example by example."""

import zlib
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from robustprune_jax import attacks, smoothing
from robustprune_jax.bounds import margins, verify, without_error_term
from robustprune_jax.config import certificates
from robustprune_jax.data import Split
from robustprune_jax.data.augment import to_float
from robustprune_jax.evaluation.predictions import predictions
from robustprune_jax.evaluation.records import recorded
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import sparsity
from robustprune_jax.runtime import distributed, sharding


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
    the largest bound of that and the methods before is positive. 'complete', the last, is
    bounds.verify: each line has what a Verdict says, and what it falsifies counts as attacked.

    With config.evaluate.attack 'standard' the ensemble of attacks.standard follows PGD, in the same
    ball: a line has the attack that broke the image, 'clean' if it needed none, '' if it stands.

    Smoothing certifies the first config.evaluate.smooth.examples images: a line has the smoothed
    classifier's prediction, -1 where it abstains, and the radius; with `anytime` the draws, too.
    """
    settings, pgd = config.evaluate, dict(config.evaluate.pgd)
    subject = _subject(config, name, logits_fn(module, variables), test, workdir / 'examples')
    clean = _is_right(subject, 'clean', None)
    attacked = _is_right(subject, 'pgd', pgd)
    broken = ~(clean & attacked)
    accuracy = float(attacked.mean())
    robust = {'pgd': {'accuracy': accuracy, 'examples': subject.count, **pgd}}
    if settings.attack == 'standard':
        robust['standard'], broken_by_ensemble = _under_ensemble(subject, pgd)
        broken = broken | broken_by_ensemble
    if methods := certificates(config):
        certified = settings.certified
        robust |= _proved(subject, methods, pgd, certified, clean & attacked, broken)
    if settings.smooth.examples:
        robust['smooth'] = _certified_radii(subject, settings.smooth)
    layers = _weights(module, variables, test.images.shape[1:])
    total = layers.pop('total')
    return {
        'name': name,
        **{count: total[count] for count in ('kept', 'effective', 'prunable') if count in total},
        'layers': {layer: [x['kept'], x['prunable']] for layer, x in layers.items()},
        'clean_accuracy': float(clean.mean()),
        'examples': subject.count,
        'robust': robust,
    }


def _weights(module, variables, image_shape):
    """What `sparsity` counts; not what has an effect where the network's wiring is unknown."""
    try:
        return sparsity(variables, module, image_shape)
    except NotImplementedError:
        return sparsity(variables)


def _subject(config, name, network, test, folder) -> Subject:
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


def _is_right(subject: Subject, evaluation: str, attack: dict | None) -> np.ndarray:
    """Which images are classified rightly, as they are or under PGD, bool [N]."""

    def predict(batch, first):
        batch = sharding.put(batch, sharding.sharded(subject.mesh))
        key = jax.random.fold_in(subject.key, first)
        found = predictions(subject.placed, key, batch['image'], batch['label'], attack)
        return {'prediction': found}

    lines = subject.record(evaluation, attack or {}, predict)
    return np.array([line['label'] == line['prediction'] for line in lines])


def _under_ensemble(subject: Subject, pgd: dict) -> tuple[dict, np.ndarray]:
    """The entry of the standard ensemble, and which images it broke, bool [N]."""
    ball, size = {'eps': pgd['eps'], 'norm': pgd['norm']}, subject.header['batch_size']
    # More images than slots, so that few slots stay empty while the last images are attacked.
    broken_by = partial(_broken_by, subject.network, subject.key, ball, size)
    lines = subject.record('standard', ball, broken_by, at_once=4 * size)
    names = np.array([line['broken_by'] for line in lines])
    after = attacks.accuracy_after(names)
    entry = {'accuracy': min(after.values()), 'examples': subject.count, **ball, 'after': after}
    return entry, names != ''


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


def _proved(
    subject: Subject,
    methods: list[str],
    pgd: dict,
    settings: ConfigDict,
    stands: np.ndarray,
    broken: np.ndarray,
) -> dict[str, dict]:
    """The entries of the cascade of bounds. stands: which images PGD leaves, broken: which some
    attack does not, bool [N]. Bounds are sound in floating point where the network lets them.

    Raises AssertionError where an image is verified and broken: a bound is not sound.
    """
    image = jax.ShapeDtypeStruct(subject.test.images.shape[1:], jnp.float32)
    ball = {
        'eps': pgd['eps'],
        'norm': pgd['norm'],
        'sound': not without_error_term(subject.network, image),
    }
    robust = {}
    verified = np.zeros(subject.count, bool)
    for i, method in enumerate(methods):
        wanted = np.flatnonzero(stands & ~verified) if i else None
        before = {'after': methods[:i], 'pgd': pgd} if i else {'after': []}  # what chose `wanted`
        if method == 'complete':
            lines, given = _decided(subject, ball, settings, before, wanted)
            proved = [line['index'] for line in lines if line['status'] == 'verified']
            lost = [line['index'] for line in lines if line['status'] == 'falsified']
            stands = stands & ~np.isin(np.arange(subject.count), lost)
        else:
            given = ball
            bound = partial(
                _least_margin,
                subject.placed,
                subject.mesh,
                methods[: i + 1],
                ball,
                settings.memory_gb,
            )
            lines = subject.record(method, {**ball, **before}, bound, wanted=wanted)
            proved = [line['index'] for line in lines if line['margin'] > 0]
        verified[proved] = True
        accuracy = float(verified.mean())
        robust[method] = {'accuracy': accuracy, 'examples': subject.count, **given}
    fooled = np.flatnonzero(verified & broken)
    if len(fooled):
        raise AssertionError(
            f'{subject.name}: test images {fooled[:5].tolist()} are verified and misclassified '
            'under attack: a bound is not sound; please report it'
        )
    undecided = stands & ~verified
    robust[methods[-1]] |= {
        'attacked': float(np.mean(~stands)),
        'undecided': float(np.mean(undecided)),
        'counts': {
            'verified': int(verified.sum()),
            'falsified': int((~stands).sum()),
            'undecided': int(undecided.sum()),
        },
    }
    return robust


def _decided(subject, ball, settings, before, wanted) -> tuple[list[dict], dict]:
    """The lines of branch and bound, an image at a time for each process, and its settings."""

    def decide(batch, first):
        mine = np.array_split(np.flatnonzero(batch['mask']), jax.process_count())
        mine = mine[jax.process_index()]
        found = []
        if len(mine):
            images, labels = to_float(batch['image'][mine]), batch['label'][mine]
            found = verify(
                subject.network,
                images,
                labels,
                **ball,
                timeout=settings.timeout,
                key=jax.random.fold_in(subject.key, first),
                memory_gb=settings.memory_gb,
            )
        fields = ('status', 'by', 'reason', 'bound', 'domains', 'seconds')
        verdicts = [{field: getattr(v, field) for field in fields} for v in found]
        verdicts = [*chain(*distributed.exchange(verdicts))]
        return {field: np.array([v[field] for v in verdicts]) for field in fields}

    given = {**ball, 'timeout': settings.timeout}
    header, at_once = {**given, **before}, jax.process_count()
    return subject.record('complete', header, decide, at_once, wanted), given


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


def _certified_radii(subject: Subject, settings: ConfigDict) -> dict:
    """The entry of randomized smoothing, of the first settings.examples images."""
    sampling = {name: settings[name] for name in ('sigma', 'n0', 'n', 'alpha')}
    measure, fields, copies = smoothing.certify, ('prediction', 'radius'), settings.n0 + settings.n
    if settings.anytime:
        sampling['wanted'] = list(settings.radii)
        measure, fields = smoothing.certify_anytime, (*fields, 'draws')
        copies = smoothing.LOOK // 4  # so that the batch stays full while images leave it
    count = min(settings.examples, subject.count)

    def certify(batch, first):
        images = to_float(batch['image'])
        found = measure(
            subject.placed,
            subject.key,
            images,
            batch_size=settings.batch_size,
            num_classes=jax.eval_shape(subject.placed, images).shape[-1],
            first=first,
            **sampling,
        )
        return dict(zip(fields, found, strict=True))

    images_at_once = max(1, settings.batch_size // copies)
    lines = subject.record('smooth', sampling, certify, images_at_once, np.arange(count))
    right = np.array([line['label'] == line['prediction'] for line in lines])
    radius = np.array([line['radius'] for line in lines])
    draws = {'draws': float(np.mean([line['draws'] for line in lines]))} if settings.anytime else {}
    return {
        **sampling,
        **draws,
        'examples': count,
        'acr': float(np.mean(right * radius)),
        'abstention': float(np.mean([line['prediction'] == smoothing.ABSTAIN for line in lines])),
        'certified_accuracy': {
            f'{r:g}': float(np.mean(right & (radius >= r))) for r in settings.radii
        },
    }
