"""In what order a network computes with its parameters."""

from functools import cache, partial

import jax
from flax import linen
from flax.traverse_util import flatten_dict

from robustprune_jax.graph.interpret import PRODUCTS, eval_program, interpret

_OTHER, _IMAGE = object(), object()


@cache
def kernels_in_order(
    module: linen.Module, image_shape: tuple[int, ...]
) -> tuple[tuple[str, ...], ...]:
    """Returns the paths of the parameters that multiply what depends on the image, from the first
    layer to the last, in eval mode. image_shape: (H, W, C)."""
    network, program = eval_program(module, image_shape)
    marked = {
        name: {path: path if name == 'params' else _OTHER for path in flatten_dict(tree)}
        for name, tree in network.items()
    }
    paths = jax.tree_util.tree_leaves_with_path(network)
    args = [marked[name.key][tuple(key.key for key in path)] for (name, *path), _ in paths]
    found: list[tuple[str, ...]] = []
    interpret(program, [*args, _IMAGE], partial(_follow, found), lambda value: _OTHER)
    return tuple(found)


def _follow(found, eqn, inputs, nested):
    """A parameter stays itself until it meets another, or the image."""
    parameters = [x for x in inputs if x not in (_OTHER, _IMAGE)]
    if _IMAGE in inputs and eqn.primitive.name in PRODUCTS:
        found.extend(parameters)
    one = _IMAGE if _IMAGE in inputs else parameters[0] if len(parameters) == 1 else _OTHER
    return [one] * len(eqn.outvars)
