"""Which channels of a network can only go together, found from its own operations.

A unit is what one output of a kernel makes, a channel or a feature, everywhere in the image. Units
that are added, multiplied or compared entry by entry are one: those of a residual stream, or what a
gate scales; so are the inputs and the outputs of each part of a grouped convolution. The image's
channels and the logits always stay, and with them whatever is one with them.
"""

from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from flax import linen
from jax.extend.core import JaxprEqn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from robustprune_jax.graph.interpret import (
    MOVES,
    PRODUCTS,
    computed,
    eval_program,
    goes_by_entry,
    interpret,
    moved,
    place,
)

Path = tuple[str, ...]
# Of entries that no unit makes, such as padding; and of the image.
_NONE, _IMAGE = np.int32(-1), np.int32(0)
_WINDOW = ('window_dimensions', 'window_strides', 'padding', 'base_dilation', 'window_dilation')


class Coupling:
    """What the kernels of a network make and read, as numbers of units; -1: what always stays.

    made: kernel -> int [outputs]; read: kernel -> int [inputs], but for grouped convolutions, whose
    inputs are one with their outputs. group: int [units], of which layer a unit is; layers that
    share a unit are one. positions: kernel -> at how many places of an image it multiplies.
    Compared by identity: functions are compiled for it.
    """

    def __init__(self, made: dict, read: dict, group: np.ndarray, positions: dict):
        self.made, self.read, self.group, self.positions = made, read, group, positions


class _Parameter(NamedTuple):
    path: Path


class _Units(NamedTuple):
    """For each entry of a value the unit that it is of."""

    entries: np.ndarray


@cache
def coupled_units(module: linen.Module, image_shape: tuple[int, ...]) -> Coupling:
    """Returns how the channels of a network depend on each other, in eval mode.

    image_shape: (H, W, C). Raises NotImplementedError, with the line of the model, on an operation
    of which that is unknown.
    """
    network, program = eval_program(module, image_shape)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(network)]
    args = [
        _Parameter(tuple(key.key for key in path)) if collection.key == 'params' else None
        for collection, *path in paths
    ]
    search = _Search()
    pixels = _Units(np.full((1, *image_shape), _IMAGE))
    (logits,) = interpret(program, [*args, pixels], search.rule)
    search.join(logits.entries, _IMAGE)
    return search.coupling()


class _Search:
    """The units found so far, and the pairs of them that are one."""

    def __init__(self):
        self.count, self.pairs = 1, [np.empty((2, 0), np.int32)]
        self.made: dict[Path, np.ndarray] = {}
        self.read: dict[Path, np.ndarray] = {}
        self.positions: dict[Path, int] = {}

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        one, other = np.broadcast_arrays(one, other)
        differ = (one != other) & (one >= 0) & (other >= 0)
        if differ.any():
            self.pairs.append(np.unique(np.stack([one[differ], other[differ]]), axis=1))

    def rule(self, eqn: JaxprEqn, inputs: list, nested: tuple[JaxprEqn, ...]) -> list:
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        units = [x.entries for x in inputs if isinstance(x, _Units)]
        if not units:
            return _constant(eqn, inputs)
        if name in PRODUCTS:
            outputs = [self.product(eqn, inputs)]
        elif name in MOVES:
            outputs = moved(eqn, inputs, _Units, _NONE)
        elif name.startswith('reduce_window'):
            outputs = [_window(eqn, units[0])]
        elif name.startswith('reduce_') and 'axes' in eqn.params:
            outputs = [self.reduced(units[0], eqn.params['axes'])]
        elif goes_by_entry(eqn, units):
            outputs = [np.broadcast_to(units[0], shape)] * len(eqn.outvars)
            for entries in units[1:]:
                self.join(outputs[0], entries)
                outputs = [np.maximum(outputs[0], entries)] * len(eqn.outvars)
        else:
            outputs = [None]
        if outputs[0] is None:
            raise NotImplementedError(
                f'how channels depend on each other through {name!r} is unknown, at '
                f'{place(nested)}: pruning.structure=weights takes any network'
            )
        return [_Units(np.asarray(entries)) for entries in outputs]

    def reduced(self, entries, axes):
        flat = np.moveaxis(entries, axes, range(len(axes)))
        flat = flat.reshape(-1, *flat.shape[len(axes) :])
        result = flat.max(axis=0, initial=_NONE)
        self.join(np.unique(flat, axis=0), result)
        return result

    def product(self, eqn, inputs):
        """New units, one for each output of the kernel; None where it is unlike Flax's layers'."""
        layout = _layout(eqn)
        if layout is None or not isinstance(inputs[1], _Parameter):
            return None
        (of_inputs, of_outputs), entries = layout, inputs[0].entries
        rows = np.moveaxis(entries, of_inputs, -1).reshape(-1, entries.shape[of_inputs])
        read = rows.max(axis=0)
        if ((rows != read) & (rows != _NONE)).any():
            return None
        shape = eqn.outvars[0].aval.shape
        made = self.count + np.arange(shape[of_outputs], dtype=np.int32)
        self.count += len(made)
        path, groups = inputs[1].path, eqn.params.get('feature_group_count', 1)
        self.join(self.made.setdefault(path, made), made)  # of a kernel that is used again
        if groups == 1:
            self.join(self.read.setdefault(path, read), read)
        else:
            read, parts = read.reshape(groups, -1), made.reshape(groups, -1)
            self.join(np.where(read == _NONE, _IMAGE, read), parts[:, :1])
            self.join(parts, parts[:, :1])
        places = int(np.prod(shape)) // len(made)
        self.positions[path] = self.positions.get(path, 0) + places
        others = [axis for axis in range(len(shape)) if axis != of_outputs]
        return np.broadcast_to(np.expand_dims(made, others), shape)

    def coupling(self) -> Coupling:
        one = _connected(self.count, self.pairs)
        found = np.unique(one[np.concatenate([np.empty(0, int), *self.made.values()])])
        movable = found[found != one[_IMAGE]]
        numbers = np.full(self.count + 1, -1)  # of components; the last is that of _NONE
        numbers[movable] = np.arange(len(movable))
        one = np.append(one, self.count)
        made = {path: numbers[one[units]] for path, units in self.made.items()}
        read = {path: numbers[one[units]] for path, units in self.read.items()}
        layers = [units[units >= 0] for units in made.values()]
        together = [np.stack([units[:-1], units[1:]]) for units in layers]
        return Coupling(made, read, _connected(len(movable), together), self.positions)


def _connected(count, pairs):
    """Returns for each of `count` numbers the number of its component."""
    one, other = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(one)), (one, other)), (count, count))
    return connected_components(graph, directed=False)[1]


def _constant(eqn, inputs):
    """A parameter stays itself until it meets another. Of other constants the values count: they
    may be places of entries."""
    parameters = [x for x in inputs if isinstance(x, _Parameter)]
    if not parameters and all(x is not None for x in inputs):
        return computed(eqn, inputs)
    return [parameters[0] if len(parameters) == 1 else None] * len(eqn.outvars)


def _layout(eqn):
    """The axes of the inputs' and of the outputs' units in a product whose kernel has them in its
    last axes but one and last; None in others."""
    rank = len(eqn.invars[1].aval.shape)
    numbers = eqn.params['dimension_numbers']
    if eqn.primitive.name == 'dot_general':
        (left, right), (batch, _) = numbers
        if rank != 2 or right != (0,) or batch:
            return None
        return left[0], len(eqn.outvars[0].aval.shape) - 1
    if numbers.rhs_spec[:2] != (rank - 1, rank - 2) or eqn.params['batch_group_count'] > 1:
        return None
    return numbers.lhs_spec[1], numbers.out_spec[1]


def _window(eqn, entries):
    """The units of a window's entries; None where it holds several."""
    params = {name: eqn.params[name] for name in _WINDOW}

    def largest(x):
        return np.asarray(jax.lax.reduce_window_max_p.bind(x, **params))

    high = largest(entries)
    low = -largest(np.where(entries < 0, -np.iinfo(np.int32).max, -entries))
    return None if (high != low)[high >= 0].any() else np.maximum(high, _NONE)
