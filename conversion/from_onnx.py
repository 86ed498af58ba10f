"""ONNX files as a network's graph: the operations that verifiers' benchmarks are made of."""

import inspect
import os
from collections.abc import Callable
from functools import reduce

import numpy as np

from .graph import Graph


def read_onnx(path: str | os.PathLike) -> Graph:
    """Returns the graph of a network of one float32 input and one output, for a batch of one.

    conversion.evaluate.logits_fn makes a function of it. Raises NotImplementedError, naming the
    operation and its node, where one is not read, ValueError where the file is no such network,
    and ImportError where onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError('this needs the package onnx: pip install onnx') from None
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError:
        raise
    except Exception as error:  # protobuf's and the checker's have nothing in common
        raise ValueError(f'{path} is no ONNX file, or damaged: {str(error)!r:.200}') from None
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    inputs = [x for x in model.graph.input if x.name not in arrays]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ValueError(
            f'{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs: expected one'
        )
    graph = Graph(_image_shape(inputs[0].type.tensor_type, path))
    known = {inputs[0].name: 'images'}
    known |= {name: _constant(graph, array.shape, value=array) for name, array in arrays.items()}
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        x.name: tuple(dim.dim_value for dim in x.type.tensor_type.shape.dim)
        for x in (*inferred.value_info, *inferred.output)
    }
    for node in model.graph.node:
        output = _translated(graph, node, known, shapes, _attributes(onnx, node))
        if output is None:
            raise NotImplementedError(f'{path}: {_refusal(node)}')
        known[node.output[0]] = output
    graph.finish(known[model.graph.output[0].name], 'logits')
    return graph


def _image_shape(tensor, path) -> tuple[int, ...]:
    """The input's shape without the axis of the batch, whose size becomes 1."""
    sizes = [dim.dim_value for dim in tensor.shape.dim]  # 0 where it is free
    if len(sizes) < 2 or sizes[0] > 1 or 0 in sizes[1:] or tensor.elem_type != 1:
        raise ValueError(
            f'{path}: its input is of type {tensor.elem_type}, {sizes}: expected 1 (float32), '
            '[1 or free, sizes ...]'
        )
    tensor.shape.dim[0].dim_value = 1
    return tuple(sizes[1:])


def _attributes(onnx, node) -> dict:
    values = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    if node.op_type != 'Constant':
        return values
    (value,) = values.values()
    tensor = isinstance(value, onnx.TensorProto)
    return {'value': onnx.numpy_helper.to_array(value) if tensor else np.array(value)}


def _translated(graph, node, known, shapes, attributes) -> str | None:
    rule, shape = RULES.get(node.op_type), shapes.get(node.output[0], (0,))
    names = [known.get(name) for name in node.input if name]
    if rule is None or 0 in shape or None in names:
        return None
    try:
        call = inspect.signature(rule).bind(graph, shape, *names, **attributes)
    except TypeError:  # an attribute or input that the rule has not
        return None
    return rule(*call.args, **call.kwargs)


def _refusal(node) -> str:
    known = node.op_type in RULES
    attributes = ', '.join(x.name for x in node.attribute)
    return (
        f'node {node.name or node.output[0]!r}: {"this use of " if known else ""}{node.op_type} '
        f'{f"({attributes}) " if known and attributes else ""}is not read; there is '
        f'{", ".join(sorted(RULES))}'
    )


# Rules: (graph, the output's shape, inputs by their names in the graph, attributes) -> the output's
# name, or None where that is not read. The defaults are those of ONNX.


def _constant(graph, shape, *, value):
    if value.dtype.kind not in 'fiub':  # text, or what is sparse
        return None
    return graph.constant(value, f'constant.{len(graph.initialisers)}')


def _entrywise(op):
    return lambda graph, shape, *inputs: graph.add(op, inputs)


def _max(graph, shape, *inputs):
    return reduce(lambda x, y: graph.add('Max', [x, y]), inputs)


def _leaky_relu(graph, shape, x, *, alpha=0.01):
    return graph.add('LeakyRelu', [x], alpha=alpha)


def _gemm(graph, shape, x, kernel, bias=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    given = [graph.initialisers.get(name) for name in (kernel, bias) if name]
    if transA or any(array is None for array in given):
        return None
    weight, *shift = given
    inputs = [weight * np.float32(alpha) if transB else weight.T * np.float32(alpha)]
    inputs += [array * np.float32(beta) for array in shift]
    inputs = [_constant(graph, array.shape, value=array) for array in inputs]
    return graph.add('Gemm', [x, *inputs], transB=1)


def _windows(shape, strides, pads, dilations, auto_pad) -> dict | None:
    half = len(shape) - 2
    if auto_pad not in (b'NOTSET', b'VALID'):
        return None
    return {
        'strides': strides or [1] * half,
        'pads': pads or [0] * 2 * half,
        'dilations': dilations or [1] * half,
    }


def _conv(
    graph, shape, x, kernel, *bias, kernel_shape=None, strides=None, pads=None, dilations=None,
    group=1, auto_pad=b'NOTSET',
):  # fmt: skip
    windows = _windows(shape, strides, pads, dilations, auto_pad)
    if windows is None or kernel not in graph.initialisers:
        return None
    sizes = graph.initialisers[kernel].shape[2:]
    return graph.add('Conv', [x, kernel, *bias], kernel_shape=sizes, group=group, **windows)


def _pool(op):
    def pool(
        graph, shape, x, *, kernel_shape, strides=None, pads=None, dilations=None, ceil_mode=0,
        auto_pad=b'NOTSET', storage_order=0, count_include_pad=0,
    ):  # fmt: skip
        windows = _windows(shape, strides, pads, dilations, auto_pad)
        if windows is None or ceil_mode or set(windows.pop('dilations')) != {1}:
            return None
        if op == 'AveragePool' and any(windows['pads']) and not count_include_pad:
            return None
        return graph.add(op, [x], kernel_shape=kernel_shape, **windows)

    return pool


def _reduction(op):
    def reduction(graph, shape, x, given=None, *, axes=None, keepdims=1, noop_with_empty_axes=0):
        axes = graph.initialisers[given].tolist() if given in graph.initialisers else axes
        return graph.add(op, [x], axes=axes, keepdims=keepdims) if axes else None

    return reduction


def _global_average(graph, shape, x):
    return graph.add('ReduceMean', [x], axes=list(range(2, len(shape))), keepdims=1)


def _batch_norm(
    graph, shape, x, *statistics, epsilon=1e-5, momentum=0.9, training_mode=0, spatial=1
):
    if training_mode or not spatial or any(name not in graph.initialisers for name in statistics):
        return None
    scale, bias, mean, variance = (graph.initialisers[s].astype(np.float64) for s in statistics)
    scale /= np.sqrt(variance + epsilon)
    for op, array in (('Mul', scale), ('Add', bias - mean * scale)):
        array = array.astype(np.float32).reshape(-1, *[1] * (len(shape) - 2))
        x = graph.add(op, [x, _constant(graph, shape, value=array)])
    return x


def _reshape(graph, shape, x, sizes=None, *, axis=1, axes=None, allowzero=0):
    return graph.add('Reshape', [x, _constant(graph, shape, value=np.array(shape))])


def _expand(graph, shape, x, sizes):
    return graph.add('Expand', [x, _constant(graph, shape, value=np.array(shape))])


def _transpose(graph, shape, x, *, perm=None):
    return graph.add('Transpose', [x], perm=perm or list(range(len(shape)))[::-1])


def _concat(graph, shape, *inputs, axis):
    return graph.add('Concat', inputs, axis=axis)


ENTRYWISE = (
    'Abs', 'Add', 'Div', 'Erf', 'Exp', 'Log', 'MatMul', 'Mul', 'Neg', 'Reciprocal', 'Relu',
    'Sigmoid', 'Sqrt', 'Sub', 'Tanh',
)  # fmt: skip
RULES: dict[str, Callable[..., str | None]] = {
    **{op: _entrywise(op) for op in ENTRYWISE},
    **{op: _pool(op) for op in ('AveragePool', 'MaxPool')},
    **{op: _reduction(op) for op in ('ReduceMax', 'ReduceMean')},
    **dict.fromkeys(('Flatten', 'Reshape', 'Squeeze', 'Unsqueeze'), _reshape),
    'BatchNormalization': _batch_norm,
    'Concat': _concat,
    'Constant': _constant,
    'Conv': _conv,
    'Expand': _expand,
    'Gemm': _gemm,
    'GlobalAveragePool': _global_average,
    'Identity': lambda graph, shape, x: x,
    'LeakyRelu': _leaky_relu,
    'Max': _max,
    'Transpose': _transpose,
}
