"""Interval and backward linear bounds (CROWN, Zhang et al. 2018) over the nodes of a graph.

One example at a time, without a batch axis. Bounds of a node are (lower, upper), arrays of its
shape; `bounds` maps node numbers to them. A linear form is a stack of rows [S, ...] per node.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustprune_jax.bounds.nodes import Affine, Graph, MaxPool, Relu

Array = jax.Array
Bounds = dict[int, tuple[Array, Array]]

IMAGES = 'images'  # the name of the batch axis over which bounds are vmapped

# Nodes that sum inputs: a chain with two of them is bounded more tightly as a whole.
_MIXING = {'dot_general', 'conv_general_dilated', 'reduce_sum', 'reduce_window_sum', 'cumsum'}


class Ball(NamedTuple):
    """The perturbed images: the box [lower, upper], and within it an l_2 or l_1 ball."""

    image: Array
    lower: Array
    upper: Array
    eps: Array
    norm: str


def interval(graph: Graph, number: int, bounds: Bounds) -> tuple[Array, Array]:
    """Returns the interval bounds of node `number` from those of its inputs.

    Affine nodes in centre and radius form: |W| is applied to the radius once.
    """
    node = graph.nodes[number]
    inputs = [bounds[i] for i in node.inputs]
    if isinstance(node, Affine):
        center = node.apply(*((upper + lower) / 2 for lower, upper in inputs))
        radius = node.absolute(*((upper - lower) / 2 for lower, upper in inputs))
        return center - radius, center + radius
    ((lower, upper),) = inputs
    if isinstance(node, Relu):
        slope = node.negative_slope
        return jnp.maximum(lower, slope * lower), jnp.maximum(upper, slope * upper)
    return node.apply(lower), node.apply(upper)


def intervals(graph: Graph, ball: Ball) -> Bounds:
    """Returns the interval bounds of every node (IBP, Gowal et al. 2018)."""
    bounds = {0: (ball.lower, ball.upper)}
    for number in range(1, len(graph.nodes)):
        bounds[number] = interval(graph, number, bounds)
    return bounds


def crown_slope(upper_slope: Array, negative_slope: Array) -> Array:
    """CROWN's lower slope: 1 where the upper one is at least a half, else the negative side's."""
    return jnp.where(upper_slope >= 0.5, 1, negative_slope)


def parallel_slope(upper_slope: Array, negative_slope: Array) -> Array:
    """The zonotope's (Fast-Lin's) lower slope: the same as the upper one."""
    return upper_slope


def _relax(node: Relu, lower: Array, upper: Array, lower_slope: Callable):
    """Returns the slope and intercept of relu's upper line, and the slope of its lower line."""
    slope = node.negative_slope
    unstable = (lower < 0) & (upper > 0)
    # A slope below the chord's is sound too, and widths near 0 would overflow its derivative.
    width = jnp.where(unstable, jnp.maximum(upper - lower, 1e-12), 1)
    crossing = (upper - slope * lower) / width
    stable = jnp.where(upper > 0, 1, slope)
    above = jnp.where(unstable, crossing, stable)
    below = jnp.where(unstable, lower_slope(crossing, slope), stable)
    intercept = jnp.where(unstable, upper - crossing * upper, 0)
    return above, intercept, below


def _row_sum(rows: Array) -> Array:
    return rows.reshape(len(rows), -1).sum(axis=1)


def _lowest(rows: Array, lower: Array, upper: Array) -> Array:
    """The least value of each row over a box."""
    center, radius = (upper + lower) / 2, (upper - lower) / 2
    return _row_sum(rows * center) - _row_sum(jnp.abs(rows) * radius)


def _lowest_in_ball(rows: Array, ball: Ball) -> Array:
    """The least value of each row over the perturbed images."""
    box = _lowest(rows, ball.lower, ball.upper)
    if ball.norm == 'linf':
        return box
    flat = rows.reshape(len(rows), -1)
    dual = jnp.abs(flat).max(axis=1) if ball.norm == 'l1' else _safe_norm(flat)
    return jnp.maximum(box, _row_sum(rows * ball.image) - ball.eps * dual)


def _safe_norm(flat):
    squares = jnp.sum(flat**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def lower_bounds(
    graph: Graph,
    rows: Array,
    number: int,
    bounds: Bounds,
    ball: Ball,
    lower_slope: Callable | None,
) -> Array:
    """Returns lower bounds [S] of rows [S, ...] applied to node `number`.

    The rows are carried backward through the affine nodes. lower_slope: how relu is relaxed, and
    the walk goes on to the image; None: it ends at the first non-linear nodes, whose interval
    bounds are used (so the last layer and the rows are one affine map).
    """
    return _walk(graph, rows, number, bounds, ball, lower_slope)[0]


def both_bounds(
    graph: Graph, rows: Array, number: int, bounds: Bounds, ball: Ball, lower_slope: Callable
) -> tuple[Array, Array]:
    """Returns lower and upper bounds [S] of rows [S, ...] applied to node `number`."""
    pools = any(isinstance(node, MaxPool) for node in graph.nodes[: number + 1])
    if lower_slope is parallel_slope and not pools:
        return _walk(graph, rows, number, bounds, ball, lower_slope)
    both = jnp.concatenate([rows, -rows])
    low, high = lower_bounds(graph, both, number, bounds, ball, lower_slope).reshape(2, -1)
    return low, -high


def _walk(graph, rows, number, bounds, ball, lower_slope):
    """lower_bounds, and upper bounds which hold where the lines around every relu are parallel:
    then the same rows reach the image for both."""
    forms = {number: rows}
    total = above_total = jnp.zeros(len(rows), rows.dtype)
    for i in range(number, 0, -1):
        if i not in forms:
            continue
        node, form = graph.nodes[i], forms.pop(i)
        if isinstance(node, Affine):
            shapes = [graph.shapes[j] for j in node.inputs]
            if node.constant is not None:
                constant = _row_sum(form * node.constant)
                total, above_total = total + constant, above_total + constant
            parts = _transpose(node, shapes, form)
        elif lower_slope is None:
            total += _lowest(form, *bounds[i])
            continue
        else:
            lower, upper = bounds[node.inputs[0]]
            positive, negative = jnp.maximum(form, 0), jnp.minimum(form, 0)
            if isinstance(node, Relu):
                above, intercept, below = _relax(node, lower, upper, lower_slope)
                total += _row_sum(negative * intercept)
                above_total += _row_sum(positive * intercept)
                parts = [positive * below + negative * above]
            else:
                constant, part = _pool_form(node, lower, upper, positive, negative)
                total += constant
                parts = [part]
        for j, part in zip(node.inputs, parts, strict=True):
            forms[j] = forms[j] + part if j in forms else part
    if 0 not in forms:
        return total, above_total
    return total + _lowest_in_ball(forms[0], ball), above_total - _lowest_in_ball(-forms[0], ball)


def _transpose(node: Affine, shapes, form):
    """The rows in terms of the node's inputs."""

    if node.transpose is not None:
        return [jax.vmap(node.transpose)(form)]

    def linear(*inputs):
        out = node.apply(*inputs)
        return out if node.constant is None else out - node.constant

    transposed = jax.linear_transpose(linear, *shapes)
    return jax.vmap(transposed)(form)


def _pool_form(node: MaxPool, lower, upper, positive, negative):
    """A maximum is at least its entry of largest lower bound, and at most the largest upper one."""
    _, transposed = jax.vjp(node.apply, lower)
    return _row_sum(negative * node.apply(upper)), jax.vmap(transposed)(positive)[0]


def refined(
    graph: Graph, ball: Ball, lower_slope: Callable, rows_at_once: Callable[[int], int]
) -> Bounds:
    """Returns bounds of every node, those of non-linear nodes' inputs by backward linear bounds.

    Each is the tighter of that and the interval bound. Of a relu's input only entries that the
    interval leaves undecided are bounded anew, rows_at_once(node number) at a time: the others
    are not relaxed, whatever their bounds. Call it under `jax.vmap(..., axis_name=IMAGES)`: a
    chunk of entries is skipped where no image of the batch needs it.
    """
    bounds = {0: (ball.lower, ball.upper)}
    users = {node.inputs[0]: node for node in graph.nodes[1:] if isinstance(node, Relu | MaxPool)}
    for number in range(1, len(graph.nodes)):
        lower, upper = bounds[number] = interval(graph, number, bounds)
        if number not in users or (ball.norm == 'linf' and _interval_is_exact(graph, number)):
            continue
        undecided = (lower < 0) & (upper > 0)
        if isinstance(users[number], MaxPool):
            undecided = jnp.ones_like(undecided)
        low, high = _backward_bounds(
            graph, number, bounds, ball, lower_slope, undecided, rows_at_once(number)
        )
        bounds[number] = jnp.maximum(lower, low), jnp.minimum(upper, high)
    return bounds


def _backward_bounds(graph, number, bounds, ball, lower_slope, wanted, rows_at_once):
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
            units = jax.nn.one_hot(entries, size, dtype=bounds[0][0].dtype)
            rows = units.reshape(-1, *shape)
            return both_bounds(graph, rows, number, bounds, ball, lower_slope)

        def skip():
            infinite = jnp.full(len(entries), jnp.inf, bounds[0][0].dtype)
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
        mixing += node.primitive in _MIXING
        number = node.inputs[0]
    return mixing <= 1
