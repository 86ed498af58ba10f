"""Bounds of margins, and of what goes into every relu: the public verbs."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from robustprune_jax.bounds import alpha, linear, rounding
from robustprune_jax.bounds.affine import Affine
from robustprune_jax.bounds.graph import build
from robustprune_jax.bounds.nodes import Graph
from robustprune_jax.bounds.relu import crown_slope, parallel_slope
from robustprune_jax.runtime import compiler, inputs
from robustprune_jax.runtime.registry import lookup


class Method(NamedTuple):
    """refines: whether the bounds inside the network are by backward passes; lower_slope: the lower
    line of an undecided relu, None for intervals all the way to the last layer; climbs: whether
    these lines are then chosen by gradient ascent, for every margin anew."""

    refines: bool
    lower_slope: Callable | None
    climbs: bool = False


METHODS: dict[str, Method] = {
    'ibp': Method(False, None),
    'crown_ibp': Method(False, crown_slope),
    'crown': Method(True, crown_slope),
    'symbolic': Method(True, parallel_slope),
    'alpha_crown': Method(True, crown_slope, climbs=True),
}
NORMS = ('linf', 'l2', 'l1')
DEFAULT_MEMORY_GB = 2.0
# On CPU, one image after the other in chunks that stay in the cache was 10 times as fast.
CPU_CACHE_GB = 0.004


@compiler.full_precision
def margins(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array | None,
    *,
    eps: float | jax.Array,
    method: str = 'crown_ibp',
    norm: str = 'linf',
    clip: tuple[float, float] | None = (0.0, 1.0),
    spec: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
    memory_gb: float | None = None,
    num_classes: int | None = None,
    engine: str = 'native',
    iterations: int = 100,
    sound: bool = False,
) -> jax.Array:
    """Returns lower bounds of logit[y] - logit[j] over the ball, [B, K], 0 where j == y.

    images: [B, H, W, C]; labels: [B]; eps: the ball's radius in pixel units, a number or [B]; the
    ball, in `norm` ('linf', 'l2' or 'l1'), is cut to the box `clip`. The network must be in eval
    mode, or have no BatchNorm. method:

    - 'ibp': intervals (Gowal et al. 2018), the margins merged into the last layer;
    - 'crown_ibp': backward linear bounds over interval bounds (Zhang et al. 2020);
    - 'crown': the same, the bounds inside the network by it too (Zhang et al. 2018);
    - 'symbolic': as 'crown' with parallel lines around relu: the zonotope's relaxation
      (Fast-Lin, Weng et al. 2018), the original's symbolic intervals;
    - 'alpha_crown': as 'crown', then the lower line of every undecided relu chosen to raise each
      margin's bound, `iterations` steps of Adam (Xu et al. 2021); never below 'crown'.

    None of them is the tightest on every margin; the largest of several bounds is a bound.
    spec: [S, K] or [B, S, K], gives bounds [B, S] of spec @ logits instead. dtype: what to
    compute in, constants included; float64 needs jax_enable_x64. memory_gb: about what crown and
    symbolic may use, 2 when None. num_classes: only the first so many logits are classes.
    engine: 'native', or 'jax_verify' for linf, ibp and crown_ibp (needs the extra `verify`).
    sound: lower the bounds by what rounding may have added to them, so that they hold in floating
    point: the theorem of docs/certificates.md. Not for training.

    Raises ValueError on settings or shapes that mean nothing, MemoryError when memory_gb does not
    hold one row of a layer's bounds, NotImplementedError (with the line of the model) on an
    operation that has no bound, or with `sound` no error term. Differentiable, and runs inside or
    outside `jit`.
    """
    _check_settings(method, norm, clip, dtype, engine, sound)
    if iterations < 1:
        raise ValueError(f'iterations is {iterations}: expected 1 or more')
    inputs.check(images, labels if spec is None else None, eps=eps, norm=norm, box=clip)
    images = jnp.asarray(images)
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    logits = jax.eval_shape(logits_fn, images).shape[-1]
    classes = num_classes or logits
    rows = _specs(labels, classes, logits) if spec is None else _checked(spec, logits)
    rows = jnp.broadcast_to(rows, (len(images), *rows.shape[-2:]))
    eps = jnp.broadcast_to(jnp.asarray(eps, dtype or images.dtype), len(images))
    if engine == 'jax_verify':
        from robustprune_jax.bounds import jax_verify  # an optional extra

        boxes = jax.vmap(partial(box, clip=clip))(images, eps)
        lower = jax_verify.lower_bounds(logits_fn, *boxes, rows, method)
    else:
        memory_gb = memory_gb or DEFAULT_MEMORY_GB
        climbs = iterations if METHODS[method].climbs else 0
        lower = _native(
            logits_fn, images, eps, rows, clip, method, norm, dtype, memory_gb, climbs, sound
        )
    return lower if spec is not None else _by_class(lower, jnp.asarray(labels), classes)


def verified(lower: jax.Array) -> jax.Array:
    """Returns for which images [B] the lower bounds of margins [B, K] exclude every other class."""
    return jnp.sum(lower > 0, axis=-1) == lower.shape[-1] - 1


class Layer(NamedTuple):
    """What goes into one layer that is not affine.

    operation: the kind of node: 'Relu', 'MaxPool', 'Curve' or 'Product'; lower, upper: [B, ...], of
    the value that it reads first; unstable: [B], how many of its entries may be on either side of 0
    (all, where it is no relu).
    """

    operation: str
    lower: jax.Array
    upper: jax.Array
    unstable: jax.Array


@compiler.full_precision
def intermediate(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    *,
    eps: float | jax.Array,
    method: str = 'crown',
    norm: str = 'linf',
    clip: tuple[float, float] | None = (0.0, 1.0),
    dtype: jnp.dtype | None = None,
    memory_gb: float = DEFAULT_MEMORY_GB,
) -> list[Layer]:
    """Returns the bounds inside the network, a Layer for each operation not affine, in order.

    Arguments and errors are those of `margins`; 'ibp' and 'crown_ibp' have the same bounds here,
    and so have 'crown' and 'alpha_crown'.
    """
    _check_settings(method, norm, clip, dtype, 'native')
    inputs.check(images, eps=eps, norm=norm, box=clip)
    images = jnp.asarray(images)
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    eps = jnp.broadcast_to(jnp.asarray(eps, dtype or images.dtype), len(images))
    struct = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
    graph = build(lambda x: logits_fn(x[None])[0], struct, dtype)
    names = [type(node).__name__ for node in graph.nodes[1:] if not isinstance(node, Affine)]
    layers = _inside(logits_fn, images, eps, clip, method, norm, dtype, memory_gb)
    return [Layer(name, *layer) for name, layer in zip(names, layers, strict=True)]


def _check_settings(method, norm, clip, dtype, engine, sound=False):
    lookup(METHODS, method, 'method')
    lookup(dict.fromkeys(NORMS), norm, 'norm')
    lookup(dict.fromkeys(('native', 'jax_verify')), engine, 'engine')
    if engine == 'jax_verify' and (
        method not in ('ibp', 'crown_ibp') or norm != 'linf' or dtype is not None or sound
    ):
        raise ValueError(
            "engine='jax_verify' has methods ibp and crown_ibp, norm linf, no dtype, no sound"
        )
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError("dtype=float64 needs jax.config.update('jax_enable_x64', True)")
    if clip is not None and clip[0] > clip[1]:
        raise ValueError(f'clip is {clip}: expected (least, largest) value of a pixel')


def _specs(labels, classes, logits):
    """The rows of every label's margins, [B, classes - 1, logits]."""
    if not 2 <= classes <= logits:
        raise ValueError(f'num_classes is {classes}: the network has {logits} logits')
    inputs.check_classes(labels, classes)
    return jax.vmap(partial(label_spec, classes=classes, logits=logits))(jnp.asarray(labels))


def _checked(spec, logits):
    if spec.shape[-1] != logits:
        raise ValueError(f'spec has {spec.shape[-1]} columns: the network has {logits} logits')
    return jnp.asarray(spec)


def _by_class(lower, labels, classes):
    """Bounds of the rows of `_specs` in the order of their classes, [B, classes], 0 for the own."""
    others = _other_classes(labels[:, None], classes)
    zeros = jnp.zeros((len(labels), classes), lower.dtype)
    return zeros.at[jnp.arange(len(labels))[:, None], others].set(lower)


def _other_classes(label, classes):
    return (label + jnp.arange(1, classes)) % classes


def label_spec(label: jax.Array, classes: int, logits: int) -> jax.Array:
    """Returns the rows [classes - 1, logits] of one label's margins: its own class needs none."""
    return jax.nn.one_hot(label, logits) - jax.nn.one_hot(_other_classes(label, classes), logits)


def problem(
    logits_fn: Callable,
    image: jax.Array,
    eps: jax.Array,
    clip: tuple[float, float] | None = (0.0, 1.0),
    norm: str = 'linf',
    dtype: jnp.dtype | None = None,
    sound: bool = False,
) -> tuple[Graph, linear.Ball]:
    """Returns the graph of logits_fn for one image [H, W, C], and the ball around it.

    Raises NotImplementedError where the bounds are to be sound and an operation has no error term.
    """
    struct = jax.ShapeDtypeStruct(image.shape, image.dtype)
    graph = build(lambda x: logits_fn(x[None])[0], struct, dtype)
    if sound and (names := _without_error_term(graph)):
        raise NotImplementedError(
            f'no error term for the rounding of {", ".join(names)}: sound=False gives bounds up to '
            'their rounding'
        )
    image = image.astype(graph.dtype)
    return graph, ball_around(image, eps, clip, norm, sound)


def without_error_term(
    logits_fn: Callable[[jax.Array], jax.Array], image: jax.ShapeDtypeStruct
) -> list[str]:
    """Returns the kinds of operations on an image [H, W, C] for which bounds have no `sound`."""
    return _without_error_term(build(lambda x: logits_fn(x[None])[0], image))


def _without_error_term(graph):
    return sorted({type(n).__name__ for n in graph.nodes[1:] if not hasattr(n, 'magnitude')})


def ball_around(image, eps, clip, norm, sound):
    """Returns the ball around an image, a bit larger where it is to hold the true one."""
    if sound:
        eps = eps + rounding.of_sum(eps) + rounding.of_sum(jnp.max(jnp.abs(image)))
    return linear.Ball(image, *box(image, eps, clip), eps, norm, sound)


def box(image, eps, clip):
    """Returns the least and largest image of the l_inf ball within `clip`."""
    lower, upper = image - eps, image + eps
    if clip is not None:
        lower, upper = jnp.maximum(lower, clip[0]), jnp.minimum(upper, clip[1])
    return lower, upper


@partial(jax.jit, static_argnames=('method', 'norm', 'dtype', 'memory_gb', 'iterations', 'sound'))
def _native(logits_fn, images, eps, spec, clip, method, norm, dtype, memory_gb, iterations, sound):
    def of_margins(graph, ball, bounds, spec):
        rows = spec.astype(graph.dtype)
        if METHODS[method].climbs:
            return alpha.lower_bounds(graph, rows, bounds, ball, iterations)
        last = len(graph.nodes) - 1
        return linear.lower_bounds(graph, rows, last, bounds, ball, METHODS[method].lower_slope)

    settings = clip, method, norm, dtype, memory_gb, sound
    return each(logits_fn, images, eps, *settings, of_margins, spec)


@partial(jax.jit, static_argnames=('method', 'norm', 'dtype', 'memory_gb'))
def _inside(logits_fn, images, eps, clip, method, norm, dtype, memory_gb):
    """(lower, upper, count of the undecided) of what every node that is not affine reads first."""

    def of_layers(graph, ball, bounds):
        read = [(n, bounds[n.inputs[0]]) for n in graph.nodes[1:] if not isinstance(n, Affine)]
        return [(*map(_alone, pair), jnp.sum(node.undecided(*pair))) for node, pair in read]

    return each(logits_fn, images, eps, clip, method, norm, dtype, memory_gb, False, of_layers)


def _alone(value):
    """Without the axis of the batch of one image that the network sees, where it is the first."""
    return value[0] if value.shape[:1] == (1,) else value


def each(logits_fn, images, eps, clip, method, norm, dtype, memory_gb, sound, result, *args):
    """Returns result(graph, ball, bounds of its nodes, *args) of every image and its part of args.

    For use inside jit. On CPU one image comes after the other.
    """
    refines, lower_slope, _ = METHODS[method]
    groups = len(images) if refines and compiler.backend() == 'cpu' else 1

    def one(image, eps, *args):
        graph, ball = problem(logits_fn, image, eps, clip, norm, dtype, sound)
        if refines:
            rows_at_once = rows_in_memory(graph, len(images) // groups, memory_gb)
            bounds = linear.refined(graph, ball, lower_slope, rows_at_once)
        else:
            bounds = linear.intervals(graph, ball)
        return result(graph, ball, bounds, *args)

    every = jax.vmap(one, axis_name=linear.IMAGES)
    if groups == 1:
        return every(images, eps, *args)
    grouped = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (images, eps, *args))
    found = jax.lax.map(lambda group: every(*group), grouped)
    return jax.tree.map(lambda x: x.reshape(len(images), *x.shape[2:]), found)


def rows_in_memory(graph: Graph, images: int, memory_gb: float) -> Callable[[int], int]:
    """Returns node number -> how many of its entries to bound at once, for so many images.

    Raises MemoryError when not even one fits.
    """
    limit = min(memory_gb, CPU_CACHE_GB) if compiler.backend() == 'cpu' else memory_gb

    def rows(number):
        # Both signs; the rows of the widest node on the way, and what is computed from them.
        width = max(np.prod(shape.shape) for shape in graph.shapes[: number + 1])
        row_gb = 2 * 6 * width * images * graph.dtype.itemsize / 1e9
        if row_gb > memory_gb:
            raise MemoryError(
                f'memory_gb is {memory_gb:g}: one row of bounds for {images} images takes about '
                f'{row_gb:.2g}; give more memory or fewer images'
            )
        return min(max(int(limit / row_gb), 1), int(np.prod(graph.shapes[number].shape)))

    return rows
