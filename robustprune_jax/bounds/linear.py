"""Interval and backward linear bounds (CROWN, Zhang et al. 2018) over the nodes of a graph.

One example at a time, without a batch axis. Bounds of a node are (lower, upper), arrays of its
shape; `bounds` maps node numbers to them. A linear form is a stack of rows [S, ...] per node.
"""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import struct

from robustprune_jax.bounds import rounding
from robustprune_jax.bounds.affine import MIXING, Affine
from robustprune_jax.bounds.nodes import Array, Graph, row_sum
from robustprune_jax.bounds.relu import parallel_slope

Bounds = dict[int, tuple[Array, Array]]

IMAGES = 'images'  # the name of the batch axis over which bounds are vmapped


@struct.dataclass
class Ball:
    """The perturbed images: the box [lower, upper], and within it an l_2 or l_1 ball.

    sound: whether bounds over it are to hold in floating point, each outward by an error term.
    """

    image: Array
    lower: Array
    upper: Array
    eps: Array
    norm: str = struct.field(pytree_node=False)
    sound: bool = struct.field(pytree_node=False, default=False)

    @property
    def total(self):
        return rounding.row_sum if self.sound else row_sum


def intervals(graph: Graph, ball: Ball, known: Bounds | None = None) -> Bounds:
    """Returns interval bounds of every node (IBP, Gowal et al. 2018), for some those known."""
    bounds = {0: (ball.lower, ball.upper)} | (known or {})
    for number, node in enumerate(graph.nodes[1:], start=1):
        if number not in bounds:
            bounds[number] = _interval(node, ball, [bounds[i] for i in node.inputs])
    return bounds


def _interval(node, ball, reads):
    lower, upper = node.interval(*reads)
    if not ball.sound:
        return lower, upper
    error = rounding.gamma(node.terms[0], lower.dtype) * node.magnitude(*reads)
    return lower - error, upper + error


def _lowest(rows: Array, lower: Array, upper: Array, total: Callable) -> Array:
    """The least value of each row over a box."""
    center, radius = (upper + lower) / 2, (upper - lower) / 2
    return total(rows * center) - total(jnp.abs(rows) * radius)


def lowest_in_ball(rows: Array, ball: Ball) -> Array:
    """Returns the least value [S] of each row [S, ...] over the perturbed images."""
    box = _lowest(rows, ball.lower, ball.upper, ball.total)
    if ball.norm == 'linf':
        return box
    flat = rows.reshape(len(rows), -1)
    dual = jnp.abs(flat).max(axis=1) if ball.norm == 'l1' else _safe_norm(flat)
    return jnp.maximum(box, ball.total(rows * ball.image) - ball.eps * dual)


def loss_in_ball(rows: Array, ball: Ball) -> Array:
    """Returns how far [S] rounding may move `lowest_in_ball`."""
    terms = 0 if ball.norm == 'linf' else ball.image.size  # of the dual norm
    return rounding.loss(rows, terms, rounding.size(ball.lower, ball.upper) + ball.eps)


def _safe_norm(flat):
    squares = jnp.sum(flat**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def lower_bounds(
    graph: Graph,
    rows: Array,
    number: int,
    bounds: Bounds,
    ball: Ball,
    lower_slope: Callable | dict[int, Array] | None,
) -> Array:
    """Returns lower bounds [S] of rows [S, ...] applied to node `number`.

    The rows are carried backward through the affine nodes. lower_slope: how relu is relaxed, a rule
    or each relu's slopes [S, ...], and the walk goes on to the image; None: it ends at the first
    non-linear nodes, whose interval bounds are used (so the last layer and the rows are one affine
    map).
    """
    return _walk(graph, rows, number, bounds, ball, lower_slope)[0]


def both_bounds(
    graph: Graph,
    rows: Array,
    number: int,
    bounds: Bounds,
    ball: Ball,
    lower_slope: Callable,
    magnitudes: dict[int, Array],
) -> tuple[Array, Array]:
    """Returns lower and upper bounds [S] of rows [S, ...] applied to node `number`.

    magnitudes: of the nodes, where the ball is sound: the same for all rows.
    """
    parallel = all(n.parallel for n in graph.nodes[1 : number + 1])
    if lower_slope is parallel_slope and parallel and not ball.sound:
        return _walk(graph, rows, number, bounds, ball, lower_slope)
    both = jnp.concatenate([rows, -rows])
    both, _ = _walk(graph, both, number, bounds, ball, lower_slope, magnitudes)
    low, high = both.reshape(2, -1)
    return low, -high


def _walk(graph, rows, number, bounds, ball, lower_slope, magnitudes=None):
    """lower_bounds, and upper bounds which hold where the lines around every node are parallel,
    up to rounding: then the same rows reach the image for both.

    Rows stay numbers like any others. What rounding changes in them at a step is bounded there and
    then, by the size of what they are rows of.
    """
    forms = {number: rows}
    low = high = lost = jnp.zeros(len(rows), rows.dtype)
    for i in range(number, 0, -1):
        if i not in forms:
            continue
        node, form = graph.nodes[i], forms.pop(i)
        if lower_slope is None and not isinstance(node, Affine):
            low += _lowest(form, *bounds[i], ball.total)
            if ball.sound:
                lost += rounding.loss(form, 0, rounding.size(*bounds[i])) + rounding.of_sum(low)
            continue
        slope = lower_slope
        if isinstance(lower_slope, dict):
            slope = partial(_given, lower_slope.get(i))
        magnitude = magnitudes[i] if magnitudes else None
        constants, at_node = carry(forms, node, form, slope, bounds, ball, magnitude)
        if constants is not None:
            low, high = low + constants[0], high + constants[1]
        lost += at_node + rounding.of_sum(low) if ball.sound else 0
    if 0 in forms:
        low += lowest_in_ball(forms[0], ball)
        high -= lowest_in_ball(-forms[0], ball)
        lost += loss_in_ball(forms[0], ball) + rounding.of_sum(low) if ball.sound else 0
    return low - lost, high


def carry(forms, node, form, lower_slope, bounds, ball, magnitude=None):
    """Adds rows of a node's value to the forms of its inputs.

    Returns its constants (low, high) [S], or None, and what rounding may lose here [S].
    """
    reads = [bounds[j] for j in node.inputs]
    constants, parts = node.backward(form, lower_slope, *reads)
    if constants is not None:
        constants = [ball.total(c) if jnp.ndim(c) else c for c in constants]
    lost = 0
    if ball.sound:
        magnitude = node.magnitude(*reads) if magnitude is None else magnitude
        lost = rounding.loss(form, node.terms[1], magnitude)
    for j, part in zip(node.inputs, parts, strict=True):
        if j in forms:
            part = forms[j] + part
            lost += rounding.loss(part, 0, rounding.size(*bounds[j])) if ball.sound else 0
        forms[j] = part
    return constants, lost


def _given(slopes, upper_slope, negative_slope):
    return slopes


def refined(
    graph: Graph, ball: Ball, lower_slope: Callable, rows_at_once: Callable[[int], int]
) -> Bounds:
    """Returns bounds of every node, those of non-linear nodes' inputs by backward linear bounds.

    Each is the tighter of that and the interval bound. Of a relu's input only entries that the
    interval leaves undecided are bounded anew, rows_at_once(node number) at a time: the others
    are not relaxed, whatever their bounds. Call it under `jax.vmap(..., axis_name=IMAGES)`: a
    chunk of entries is skipped where no image of the batch needs it.
    """
    bounds, magnitudes = {0: (ball.lower, ball.upper)}, {}
    relaxed = [node for node in graph.nodes[1:] if not isinstance(node, Affine)]
    for number, node in enumerate(graph.nodes[1:], start=1):
        reads = [bounds[i] for i in node.inputs]
        lower, upper = bounds[number] = _interval(node, ball, reads)
        if ball.sound:
            magnitudes[number] = node.magnitude(*reads)
        users = [user for user in relaxed if number in user.inputs]
        if not users or (ball.norm == 'linf' and _interval_is_exact(graph, number)):
            continue
        undecided = reduce(jnp.logical_or, [user.undecided(lower, upper) for user in users])
        both = partial(both_bounds, graph, number=number, bounds=bounds, ball=ball)
        both = partial(both, lower_slope=lower_slope, magnitudes=magnitudes)
        low, high = _backward_bounds(both, undecided, rows_at_once(number), lower.dtype)
        bounds[number] = jnp.maximum(lower, low), jnp.minimum(upper, high)
    return bounds


def _backward_bounds(both, wanted, rows_at_once, dtype):
    """Backward bounds of a node's wanted entries, and -inf, inf of those that were skipped."""
    shape, size = wanted.shape, wanted.size
    chunks = -(-size // rows_at_once)
    wanted_first = jnp.argsort(~wanted.ravel())
    wanted_first = jnp.pad(wanted_first, (0, chunks * rows_at_once - size), constant_values=size)
    count = jax.lax.pmax(jnp.sum(wanted), IMAGES)

    @jax.checkpoint
    def chunk(inputs):
        first, entries = inputs

        def bound():
            units = jax.nn.one_hot(entries, size, dtype=dtype)
            return both(units.reshape(-1, *shape))

        def skip():
            infinite = jnp.full(len(entries), jnp.inf, dtype)
            return -infinite, infinite

        return jax.lax.cond(first < count, bound, skip)

    firsts = jnp.arange(chunks) * rows_at_once
    low, high = jax.lax.map(chunk, (firsts, wanted_first.reshape(chunks, rows_at_once)))
    place = jnp.full(size, jnp.inf, low.dtype).at[wanted_first]
    low, high = (-place.set(-low.ravel(), mode='drop'), place.set(high.ravel(), mode='drop'))
    return low.reshape(shape), high.reshape(shape)


def _interval_is_exact(graph, number):
    """Whether a node is an affine map of the image that mixes at most once, along one path."""
    mixing = 0
    while number != 0:
        node = graph.nodes[number]
        if not isinstance(node, Affine) or len(node.inputs) != 1:
            return False
        mixing += node.primitive in MIXING
        number = node.inputs[0]
    return mixing <= 1
