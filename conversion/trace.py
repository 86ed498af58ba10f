"""A network as a graph, read off its own operations."""

import os
import traceback
from collections.abc import Sequence
from functools import partial

import flax
import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.tree_util import keystr, tree_flatten_with_path

from robustprune_jax.graph.interpret import NESTED, interpret, place
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import is_kernel

from .graph import Constant, Graph, Tensor, on_host
from .primitives import RULES, translate

_LIBRARIES = tuple(os.path.dirname(library.__file__) + os.sep for library in (flax, jax))


def trace(module: nn.Module, variables: dict, image_shape: Sequence[int]) -> Graph:
    """Returns the graph of the masked network in eval mode, from `images` to `logits`.

    image_shape: (H, W, C). Weights are initialisers under their Flax paths, pruned ones exact
    zeros. Raises NotImplementedError, naming the primitive, the layer and the line, where the
    module does something that is not translated, and ValueError where it returns something else
    than logits or has no kernels.
    """
    params = flatten_dict(variables.get('params', {}))
    if not any(is_kernel(path, leaf) for path, leaf in params.items()):
        raise ValueError('the network has no kernels')
    network = logits_fn(module, variables)
    (variables,) = network.args  # masked
    (batch,) = jax.export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, *image_shape), np.float32)
    try:
        closed, out = jax.make_jaxpr(network.func, return_shape=True)(variables, images)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(f for f in reversed(frames) if not f.filename.startswith(_LIBRARIES))
        raise NotImplementedError(
            'the module cannot be traced for any images in a batch of any size: '
            f'{str(error).splitlines()[0]} at {frame.filename}:{frame.lineno}'
        ) from error
    if not (
        isinstance(out, jax.ShapeDtypeStruct)
        and (len(out.shape), out.shape[:1], out.dtype) == (2, (batch,), np.float32)
    ):
        raise ValueError(f'the network must return logits, float32 [batch, K], alone, not {out}')
    weights = [  # without the collection's name; + 0 makes 0.0 of a pruned weight's -0.0
        Constant(np.asarray(leaf) + 0, keystr(path[1:], simple=True, separator='/'))
        for path, leaf in tree_flatten_with_path(variables)[0]
    ]
    height, width, channels = image_shape
    graph = Graph((channels, height, width))
    outputs = interpret(
        closed,
        [*weights, Tensor('images', (0, 3, 1, 2))],
        partial(_equation, graph),
        lambda value: Constant(on_host(value)),
    )
    if isinstance(outputs[0], Constant):
        raise ValueError('the network must return logits that depend on its images')
    graph.finish(graph.ordered(outputs[0], range(2)), 'logits')
    return graph


def _equation(graph, eqn, inputs, nested):
    if (outputs := translate(graph, eqn, inputs)) is not None:
        return outputs
    name = eqn.primitive.name
    # Empty inside a function of JAX.
    layer = next(filter(None, (str(e.source_info.name_stack) for e in reversed(nested))), 'it')
    raise NotImplementedError(
        f'no ONNX for {"this use of " if name in RULES else ""}the primitive {name!r}, as '
        f'{layer} uses it at {place(nested)}; there is for {", ".join(sorted([*RULES, *NESTED]))}'
    )
