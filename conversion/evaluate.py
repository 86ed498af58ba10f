"""What a network's graph computes, in JAX: the meaning of every operation that it is made of."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from .graph import Graph


def evaluate(graph: Graph, images: jax.Array) -> dict[str, jax.Array]:
    """Returns every value of the graph by name, its inputs and initialisers too.

    images: [B, C, H, W], in the type that all is computed in.
    """
    values = {'images': images}
    for name, array in graph.initialisers.items():
        floats = np.issubdtype(array.dtype, np.floating)
        values[name] = array.astype(images.dtype) if floats else array
    for name, node in graph.nodes.items():
        inputs = [values[x] for x in node.inputs]
        values[name] = OPERATIONS[node.op](node, *inputs)
    return values


def logits_fn(graph: Graph) -> Partial:
    """Returns the network for attacks and bounds: images [B, *graph.image_shape] -> [B, K].

    One image at a time, so of a graph for a batch of one too.
    """
    weights = {k: a for k, a in graph.initialisers.items() if np.issubdtype(a.dtype, np.floating)}
    return Partial(partial(_logits, graph), weights)


def _logits(graph, weights, images):
    graph = replace(graph, initialisers=graph.initialisers | weights)
    return jax.vmap(lambda image: evaluate(graph, image[None])['logits'].ravel())(images)


def shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every value for one image."""
    images = jax.ShapeDtypeStruct((1, *graph.image_shape), np.float32)
    return {
        name: value.shape
        for name, value in jax.eval_shape(lambda x: evaluate(graph, x), images).items()
    }


def _conv(node, x, kernel, bias=None):
    """With the channels last, as bounds carry convolutions back fastest."""
    half = len(node.attributes['pads']) // 2
    pads = node.attributes['pads']
    places = (0, half + 1, *range(1, half + 1))  # of batch, channels and pixels
    y = lax.conv_general_dilated(
        jnp.moveaxis(x, 1, -1),
        jnp.moveaxis(kernel, (0, 1), (-1, -2)),
        node.attributes['strides'],
        list(zip(pads[:half], pads[half:], strict=True)),
        rhs_dilation=node.attributes['dilations'],
        dimension_numbers=lax.ConvDimensionNumbers(places, (half + 1, half, *range(half)), places),
        feature_group_count=node.attributes['group'],
        precision='highest',
    )
    return jnp.moveaxis(y if bias is None else y + bias, -1, 1)


def _gemm(node, x, kernel, bias=0.0):
    return jnp.matmul(x, kernel.T, precision='highest') + bias


def _pool(node, x, operation, start):
    sizes, strides, pads = (node.attributes[key] for key in ('kernel_shape', 'strides', 'pads'))
    half = len(sizes)
    pads = [(0, 0), (0, 0), *zip(pads[:half], pads[half:], strict=True)]
    return lax.reduce_window(x, start, operation, (1, 1, *sizes), (1, 1, *strides), pads)


def _average_pool(node, x):
    return _pool(node, x, lax.add, 0.0) / np.prod(node.attributes['kernel_shape'])


def _reduce(reduction):
    return lambda node, x: reduction(
        x, axis=tuple(node.attributes['axes']), keepdims=bool(node.attributes['keepdims'])
    )


def _reshape(node, x, sizes):
    return x.reshape(*[len(x) if size == -1 else int(size) for size in np.asarray(sizes)])


def _entrywise(function):
    return lambda node, *inputs: function(*inputs)


# ONNX's operations, as far as conversion.primitives makes them
OPERATIONS: dict[str, Callable[..., jax.Array]] = {
    'Abs': _entrywise(jnp.abs),
    'Add': _entrywise(jnp.add),
    'AveragePool': _average_pool,
    'Concat': lambda node, *inputs: jnp.concatenate(inputs, node.attributes['axis']),
    'Conv': _conv,
    'Div': _entrywise(jnp.divide),
    'Equal': _entrywise(jnp.equal),
    'Erf': _entrywise(lax.erf),
    'Exp': _entrywise(jnp.exp),
    'Expand': lambda node, x, sizes: jnp.broadcast_to(
        x, np.broadcast_shapes(x.shape, tuple(np.asarray(sizes)))
    ),
    'Flatten': lambda node, x: x.reshape(len(x), -1),
    'Gemm': _gemm,
    'Greater': _entrywise(jnp.greater),
    'GreaterOrEqual': _entrywise(jnp.greater_equal),
    'LeakyRelu': lambda node, x: jnp.where(x > 0, x, node.attributes['alpha'] * x),
    'Less': _entrywise(jnp.less),
    'LessOrEqual': _entrywise(jnp.less_equal),
    'Log': _entrywise(jnp.log),
    'MatMul': _entrywise(lambda x, y: jnp.matmul(x, y, precision='highest')),
    'Max': _entrywise(jnp.maximum),
    'MaxPool': lambda node, x: _pool(node, x, lax.max, -jnp.inf),
    'Min': _entrywise(jnp.minimum),
    'Mul': _entrywise(jnp.multiply),
    'Neg': _entrywise(jnp.negative),
    'Not': _entrywise(jnp.logical_not),
    'Pow': _entrywise(jnp.power),
    'Reciprocal': _entrywise(jnp.reciprocal),
    'ReduceMax': _reduce(jnp.max),
    'ReduceMean': _reduce(jnp.mean),
    'Relu': lambda node, x: jnp.maximum(x, 0),
    'Reshape': _reshape,
    'Sigmoid': _entrywise(jax.nn.sigmoid),
    'Sign': _entrywise(jnp.sign),
    'Sqrt': _entrywise(jnp.sqrt),
    'Sub': _entrywise(jnp.subtract),
    'Tanh': _entrywise(jnp.tanh),
    'Transpose': lambda node, x: jnp.transpose(x, node.attributes['perm']),
    'Where': _entrywise(jnp.where),
}
