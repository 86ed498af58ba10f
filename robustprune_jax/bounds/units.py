"""A network on one ball without what is decided there: affine but for its unstable relus.

Relus whose sign the bounds decide are affine. What is left is exact:

    z = image_rows x + unit_rows relu(z) + bias        the inputs of the unstable relus
    margins = the same of x and relu(z), with rows of their own

with as many z as there are unstable relus, in the order of the network: unit_rows is strictly
lower triangular by layers. Bounds and branching cost what these few units cost. Each row has the
error that its making in floating point leaves.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.bounds import linear, rounding
from robustprune_jax.bounds.margins import problem
from robustprune_jax.bounds.nodes import Array, Graph
from robustprune_jax.bounds.relu import Relu, crown_slope
from robustprune_jax.bounds.windows import BLOCK, Windows, windows

ROWS_AT_ONCE = 64
# Layers are filled up to one of these counts of units, so that few programs serve all images.
SIZES = [0, *(BLOCK * 2**i for i in range(4)), *range(16 * BLOCK, 2**20, 8 * BLOCK)]


class Rows(NamedTuple):
    """Affine functions of the image and of the units' values: [S, P], [S, U] and [S].

    error: [S], how far rounding may move them, in their making or in any later use in float64;
    0 where nobody asks.
    """

    image: Array
    units: Array
    bias: Array
    error: Array

    def at(self, index) -> 'Rows':
        return Rows(*(part[index] for part in self))

    def filled(self, size: int) -> 'Rows':
        """Returns `size` rows: these, and some that are 1 everywhere, so proved as they come."""
        filled = Rows(*(_filled(part, size) for part in self))
        filled.bias[len(self.bias) :] = 1
        return filled


class Units(NamedTuple):
    """The unstable relus. rows: of z; lower, upper, negative_slope: [U], of z; windows: rows.image
    of each layer, for products."""

    rows: Rows
    lower: Array
    upper: Array
    negative_slope: Array
    windows: tuple[Windows, ...]


def reduced(
    graph: Graph,
    logits_fn: Callable,
    ball: linear.Ball,
    spec: Array,
    bounds: dict[int, tuple[Array, Array]],
) -> tuple[Units, Rows, tuple[int, ...]]:
    """Returns the units, the rows of spec [S, K] @ logits, and how many units each layer has.

    graph: of logits_fn, all of whose nodes are affine or relus; ball: of flat images; bounds: of
    what each relu reads, by its number. Arrays are NumPy's; layers are filled up to one of SIZES
    with units that are always 0.
    """
    bounds = {i: jax.tree.map(np.asarray, pair) for i, pair in bounds.items()}
    chosen = {i: np.flatnonzero((lower < 0) & (upper > 0)) for i, (lower, upper) in bounds.items()}
    places = {i: _place(len(entries)) for i, entries in chosen.items()}
    exact = partial(_exact, logits_fn, graph.shapes[0].shape, ball, bounds)

    def rows_of(relu, entries):
        fill = -len(entries) % ROWS_AT_ONCE
        padded = np.pad(entries, (0, fill), mode='edge').reshape(-1, ROWS_AT_ONCE)
        number = graph.nodes[relu].inputs[0]
        found = [_columns(exact(part, number, True), chosen, places) for part in padded]
        parts = (np.concatenate(part)[: len(entries)] for part in zip(*found, strict=True))
        return Rows(*(_filled(part, places[relu]) for part in parts))

    def of_units(values):
        parts = [_filled(np.ravel(values[i])[chosen[i]], places[i]) for i in bounds]
        return np.concatenate(parts)

    margins = _columns(exact(spec, len(graph.nodes) - 1, False), chosen, places)
    parts = [rows_of(relu, entries) for relu, entries in chosen.items() if len(entries)]
    rows = Rows(*map(np.concatenate, zip(margins.at(slice(0)), *parts, strict=True)))
    slopes = {i: np.broadcast_to(graph.nodes[i].negative_slope, bounds[i][0].shape) for i in bounds}
    lower, upper = ({i: pair[side] for i, pair in bounds.items()} for side in (0, 1))
    seen = tuple(windows(part.image) for part in parts)
    units = Units(rows, of_units(lower), of_units(upper), of_units(slopes), seen)
    if ball.sound:
        units = units._replace(rows=_with_use(rows, units, ball))
        margins = _with_use(margins, units, ball)
    return units, margins, tuple(size for size in places.values() if size)


def _with_use(rows, units, ball):
    """The rows, their errors with those of sums with them in float64, rounded up."""
    floor = rounding.FLOOR
    pixels = np.maximum(abs(ball.lower), abs(ball.upper)).astype(float) + ball.eps + floor
    values = np.maximum(abs(units.lower), abs(units.upper)).astype(float) + floor
    magnitude = (abs(rows.image) + floor) @ pixels + (abs(rows.units) + floor) @ values
    gamma = rounding.gamma(len(pixels) + len(values), np.float64)
    error = rows.error + gamma * (magnitude + abs(rows.bias) + floor)
    return rows._replace(error=np.float32(error * 1.001))


def _place(count):
    return next(size for size in SIZES if size >= count)


def _filled(values, count):
    return np.pad(values, [(0, count - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _columns(found, chosen, places):
    """The rows of one call of `_exact`, on the host, of the units only."""
    image, taken, bias, error = jax.device_get(found)
    columns = [
        np.pad(taken[i][:, chosen[i]], ((0, 0), (0, places[i] - len(chosen[i]))))
        if i in taken
        else np.zeros((len(bias), places[i]), bias.dtype)
        for i in chosen
    ]
    columns = np.concatenate([np.zeros((len(bias), 0), bias.dtype), *columns], 1)
    return Rows(image, columns, bias, error)


@partial(jax.jit, static_argnames=('shape', 'number', 'units'))
def _exact(logits_fn, shape, ball, bounds, rows, number, units):
    """Rows of node `number`, or of its entries where `units`, as functions of the image [S, P], of
    every relu's values {node: [S, entries]}, 0 for what is decided, a bias and its error [S]."""
    ball = jax.tree.map(lambda x: x.reshape(shape) if x.ndim else x, ball)
    graph, _ = problem(logits_fn, ball.image, ball.eps)
    every = linear.intervals(graph, ball, {graph.nodes[i].inputs[0]: bounds[i] for i in bounds})
    if units:
        shape = graph.shapes[number].shape
        rows = jax.nn.one_hot(rows, int(np.prod(shape)), dtype=graph.dtype).reshape(-1, *shape)
    forms, taken = {number: rows.astype(graph.dtype)}, {}
    bias = error = jnp.zeros(len(rows), graph.dtype)
    for i in range(number, 0, -1):
        if i not in forms:
            continue
        node, form = graph.nodes[i], forms.pop(i)
        if isinstance(node, Relu):
            open_ = node.undecided(*bounds[i])
            taken[i] = jnp.where(open_, form, 0).reshape(len(rows), -1)
            form = jnp.where(open_, 0, form)
        constants, lost = linear.carry(forms, node, form, crown_slope, every, ball)
        bias += 0 if constants is None else constants[0]
        error += lost + rounding.of_sum(bias) if ball.sound else 0
    x = forms.get(0, jnp.zeros((len(rows), *ball.image.shape), graph.dtype))
    return x.reshape(len(rows), -1), taken, bias, error
