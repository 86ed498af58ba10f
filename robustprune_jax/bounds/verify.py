"""Complete verification: a cascade that ends in branch and bound, image by image."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from tqdm import tqdm

from robustprune_jax.attacks import pgd
from robustprune_jax.attacks.pgd import NORMS as ATTACKED
from robustprune_jax.bounds import linear, roots
from robustprune_jax.bounds.affine import Affine
from robustprune_jax.bounds.branching import branch
from robustprune_jax.bounds.graph import build
from robustprune_jax.bounds.margins import (
    DEFAULT_MEMORY_GB,
    ball_around,
    box,
    each,
    label_spec,
    margins,
)
from robustprune_jax.bounds.relu import Relu, crown_slope
from robustprune_jax.bounds.units import reduced
from robustprune_jax.runtime import compiler, inputs

STEPS, RESTARTS = 40, 5  # of PGD


class Verdict(NamedTuple):
    """What is known of one image.

    status: 'verified', 'falsified', 'undecided' or 'misclassified' (not attempted); by: the stage
    that decided, '' if none; bound: the least lower bound of a margin that was reached, 0 where
    branching proved it; domains: bounded by branch and bound; seconds: spent on this image alone;
    adversarial: [H, W, C], an image in the ball that the network gets wrong; reason: why undecided.
    """

    status: str
    by: str
    bound: float
    domains: int = 0
    seconds: float = 0.0
    adversarial: np.ndarray | None = None
    reason: str = ''


@compiler.full_precision
def verify(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: float,
    norm: str = 'linf',
    clip: tuple[float, float] = (0.0, 1.0),
    timeout: float = 120.0,
    key: jax.Array | None = None,
    memory_gb: float = DEFAULT_MEMORY_GB,
    sound: bool = True,
) -> list[Verdict]:
    """Returns a Verdict for each image: does any image of its ball have another class?

    images: [B, H, W, C]; labels: [B]; eps: of the ball in `norm` ('linf', 'l2' or 'l1'), in pixel
    units, cut to the box `clip`. In order, until one decides: intervals; PGD (not in l1); CROWN;
    alpha-CROWN; the same with the bounds inside the network optimised too; branch and bound on the
    relus, until `timeout` seconds after the image's CROWN began. timeout 0: no branching. Images
    that the network gets wrong count as misclassified, and are not attempted.

    Complete for networks of affine layers and relus in l_inf: with enough time only margins of 0
    stay undecided. What else a network has is bounded, not split: the reason names it. key: of
    PGD's random starts. sound: what is verified holds in floating point, by the theorem of
    docs/certificates.md; without, up to float32's rounding. Shows a bar with the counts on a
    terminal.

    Raises ValueError on settings that mean nothing, NotImplementedError where `sound` and an
    operation has no error term; else as `margins`.
    """
    if timeout < 0:
        raise ValueError(f'timeout is {timeout}: expected seconds, or 0 for no branching')
    inputs.check(images, labels, eps=eps, norm=norm, box=clip)
    images, labels = np.asarray(images), np.asarray(labels)
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    inputs.check_network(logits_fn, images, labels)
    ball_of = partial(_ball, eps=eps, clip=clip, norm=norm, sound=sound)
    verdicts = _cheap(logits_fn, images, labels, eps, norm, clip, key, sound)
    struct = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
    graph = build(lambda x: logits_fn(x[None])[0], struct)
    prove = partial(_prove, graph, logits_fn, clip=clip, timeout=timeout, memory_gb=memory_gb)
    with tqdm(total=len(images), unit='image', disable=None) as bar:
        for i, verdict in enumerate(verdicts):
            if verdict is None:
                inside = box(images[i], np.float32(eps), clip)
                verdicts[i] = prove(images[i], int(labels[i]), ball_of(images[i]), inside)
            bar.update()
            bar.set_postfix(Counter(v.status for v in verdicts if v is not None), refresh=False)
    return verdicts


def _ball(image, eps, clip, norm, sound):
    """The ball around one image, flat."""
    ball = ball_around(image, np.float32(eps), clip, norm, sound)
    flat = {k: np.ravel(np.asarray(getattr(ball, k))) for k in ('image', 'lower', 'upper')}
    return ball.replace(**flat, eps=np.asarray(ball.eps))


def _cheap(logits_fn, images, labels, eps, norm, clip, key, sound) -> list[Verdict | None]:
    """What intervals and PGD decide, for all images at once."""
    predicted = np.asarray(_predicted(logits_fn, images))
    ball = {'eps': eps, 'norm': norm, 'clip': clip}
    lower = margins(logits_fn, images, labels, **ball, method='ibp', sound=sound)
    others = np.arange(lower.shape[1]) != labels[:, None]
    least = np.where(others, lower, np.inf).min(axis=1).tolist()
    verdicts = [
        Verdict('misclassified', 'clean', bound)
        if wrong
        else Verdict('verified', 'ibp', bound)
        if bound > 0
        else None
        for wrong, bound in zip(predicted != labels, least, strict=True)
    ]
    left = np.array([verdict is None for verdict in verdicts])
    if norm not in ATTACKED or not left.any():
        return verdicts
    key = jax.random.key(0) if key is None else key
    settings = {'eps': eps, 'step_size': eps / 8, 'steps': STEPS, 'restarts': RESTARTS}
    for loss in ('ce', 'margin'):
        found = pgd(logits_fn, key, images, labels, norm=norm, loss=loss, **settings)
        found = np.clip(found, *clip)
        wrong = np.asarray(_predicted(logits_fn, found)) != labels
        for i in np.flatnonzero(wrong & left):
            verdicts[i] = Verdict('falsified', 'pgd', least[i], adversarial=found[i])
    return verdicts


@jax.jit
def _predicted(logits_fn, images):
    return jnp.argmax(logits_fn(images), -1)


@partial(jax.jit, static_argnames=('norm', 'memory_gb', 'sound'))
def _crown(logits_fn, image, eps, spec, clip, norm, memory_gb, sound):
    """CROWN's lower bounds of spec [S, K] @ logits, [S], and of what each relu reads."""

    def found(graph, ball, bounds, spec):
        last = len(graph.nodes) - 1
        lower = linear.lower_bounds(graph, spec, last, bounds, ball, crown_slope)
        relus = [i for i, node in enumerate(graph.nodes) if isinstance(node, Relu)]
        return lower, {i: bounds[graph.nodes[i].inputs[0]] for i in relus}

    settings = clip, 'crown', norm, None, memory_gb, sound
    one = each(logits_fn, image[None], eps[None], *settings, found, spec[None])
    return jax.tree.map(lambda x: x[0], one)


def _prove(graph, logits_fn, image, label, ball, inside, *, clip, timeout, memory_gb) -> Verdict:
    """CROWN and what comes after it, of one image. inside: the box that attacks are to stay in."""
    started = time.monotonic()
    classes = graph.shapes[-1].shape[-1]
    spec = label_spec(label, classes, classes)
    settings = clip, ball.norm, memory_gb, ball.sound
    lower, bounds = _crown(logits_fn, image, ball.eps, spec, *settings)
    lower = np.asarray(lower)

    def verdict(status, by, bound, **more):
        return Verdict(status, by, float(bound), seconds=time.monotonic() - started, **more)

    if (lower > 0).all():
        return verdict('verified', 'crown', lower.min())
    others = {type(n).__name__ for n in graph.nodes[1:] if not isinstance(n, Relu | Affine)}
    if others:
        names = ', '.join(sorted(others))
        return verdict('undecided', '', lower.min(), reason=f'no branching on {names}')
    units, rows, sizes = reduced(graph, logits_fn, ball, spec[~(lower > 0)], bounds)
    whole = roots.bounded(units, sizes, rows, ball)
    if not (whole[0].lower > 0).all():
        units = roots.tightened(units, sizes, ball)
        whole = roots.bounded(units, sizes, rows, ball)
    least = whole[0].lower.min()
    if least > 0:
        return verdict('verified', 'alpha_crown', least)
    if timeout == 0:
        return verdict('undecided', '', least, reason='no branching')

    def fools(points):
        points = np.clip(points.reshape(-1, *image.shape), *inside)
        wrong = np.asarray(_predicted(logits_fn, points)) != label
        return points[wrong.argmax()] if wrong.any() else None

    outcome = branch(units, sizes, rows, whole, ball, fools, started + timeout)
    return verdict(
        outcome.status,
        '' if outcome.status == 'undecided' else 'branching',
        outcome.bound,
        domains=outcome.domains,
        adversarial=outcome.adversarial,
        reason=outcome.reason,
    )
