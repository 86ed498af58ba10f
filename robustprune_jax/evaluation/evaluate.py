"""Accuracy on held-out images, clean, attacked and certified, recorded example by example."""

from functools import partial
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from ml_collections import ConfigDict

from robustprune_jax import smoothing
from robustprune_jax.bounds import margins, verify, without_error_term
from robustprune_jax.config import certificates
from robustprune_jax.data import Split
from robustprune_jax.data.augment import to_float
from robustprune_jax.evaluation import attacked
from robustprune_jax.evaluation.subject import Subject, mine, subject_of
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import sparsity
from robustprune_jax.runtime import distributed, sharding


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
    ball, with 'fast' attacks.FAST: a line has the attack that broke the image, 'clean' if it needed
    none, '' if it stands.

    FMN measures the distance to a misclassified image for the first
    config.evaluate.distances.examples images: a line has it, Infinity where none was found.

    Smoothing certifies the first config.evaluate.smooth.examples images: a line has the smoothed
    classifier's prediction, -1 where it abstains, and the radius; with `anytime` the draws, too.
    """
    settings, pgd = config.evaluate, dict(config.evaluate.pgd)
    network, folder = logits_fn(module, variables), workdir / 'examples'
    subject = subject_of(config, name, network, test, folder)
    clean = attacked.is_right(subject, 'clean', None)
    under_pgd = attacked.is_right(subject, 'pgd', pgd)
    broken = ~(clean & under_pgd)
    accuracy = float(under_pgd.mean())
    robust = {'pgd': {'accuracy': accuracy, 'examples': subject.count, **pgd}}
    if settings.attack != 'pgd':
        robust[settings.attack], lost = attacked.under_ensemble(subject, pgd, settings.attack)
        broken = broken | lost
    if settings.distances.examples:
        robust['distances'], distances = attacked.distances(subject, settings.distances, pgd)
        if settings.distances.norm == pgd['norm']:
            broken = broken | (distances < pgd['eps'])
    if methods := certificates(config):
        certified = settings.certified
        robust |= _proved(subject, methods, pgd, certified, clean & under_pgd, broken)
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
        own, found = mine(batch), []
        if len(own):
            images, labels = to_float(batch['image'][own]), batch['label'][own]
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
