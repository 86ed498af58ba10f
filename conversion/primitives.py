"""JAX's primitives as nodes of a network's graph: channels first, weights in PyTorch's layout."""

import math

import jax
import numpy as np

from .graph import Constant, Graph, Tensor, on_host


def translate(graph: Graph, eqn, inputs: list[Tensor | Constant]) -> list | None:
    """Adds the nodes of an equation; returns its outputs, None where it is not translated."""
    if all(isinstance(x, Constant) for x in inputs):
        return _fold(eqn, inputs)
    rule = RULES.get(eqn.primitive.name)
    output = rule and rule(graph, eqn, inputs)
    return output and [output]


def _fold(eqn, inputs):
    """The equation's values; None where they need the size of the batch."""
    name, params = eqn.primitive.name, eqn.params
    sizes = [size for atom in (*eqn.invars, *eqn.outvars) for size in atom.aval.shape]
    if name == 'broadcast_in_dim':
        params = {**params, 'shape': _sizes(params['shape'], batch=1)}
    elif name not in (*_ENTRYWISE, 'reduce_window_sum') and any(
        map(jax.export.is_symbolic_dim, [*sizes, *params.values()])
    ):
        return None
    values = eqn.primitive.bind(*(x.array for x in inputs), **params)
    label = next((x.name for x in inputs if '/' in x.name), 'constant')
    if '/' in label and name not in ('reshape', 'broadcast_in_dim', 'convert_element_type'):
        label = f'{label.rpartition("/")[0]}/{name}'  # such as bn1/mul
    values = values if eqn.primitive.multiple_results else [values]
    return [Constant(on_host(value), label) for value in values]


def _sizes(shape, batch):
    """The shape, with this in the place of the batch's size."""
    return tuple(batch if jax.export.is_symbolic_dim(size) else size for size in shape)


_ENTRYWISE = {
    'abs': 'Abs', 'add': 'Add', 'div': 'Div', 'eq': 'Equal', 'erf': 'Erf',
    'exp': 'Exp', 'ge': 'GreaterOrEqual', 'gt': 'Greater', 'integer_pow': 'Pow',
    'le': 'LessOrEqual', 'log': 'Log', 'logistic': 'Sigmoid', 'lt': 'Less', 'max': 'Max',
    'min': 'Min', 'mul': 'Mul', 'ne': 'Equal Not', 'neg': 'Neg', 'pow': 'Pow',
    'rsqrt': 'Sqrt Reciprocal', 'select_n': 'Where', 'sign': 'Sign', 'sqrt': 'Sqrt',
    'square': 'Pow', 'sub': 'Sub', 'tanh': 'Tanh',
}  # fmt: skip


def _entrywise(graph, eqn, inputs):
    order = next(x.order for x in inputs if isinstance(x, Tensor))
    names = [graph.ordered(x, order) for x in inputs]
    for op in _ENTRYWISE[eqn.primitive.name].split():
        names = [graph.add(op, names)]
    return Tensor(names[0], order)


def _power(graph, eqn, inputs):
    exponent = np.asarray(eqn.params.get('y', 2), eqn.outvars[0].aval.dtype)
    return _entrywise(graph, eqn, [*inputs, Constant(exponent)])


def _add(graph, eqn, inputs):
    """A constant per channel becomes the bias of the layer before it."""
    x, c = inputs if isinstance(inputs[0], Tensor) else inputs[::-1]
    layer = graph.producer(x, 'Conv', 'Gemm')
    if layer and len(layer.inputs) == 2 and isinstance(c, Constant) and c.array.ndim:
        channels = eqn.outvars[0].aval.shape[x.order[1]]
        if c.array.size == c.array.shape[x.order[1]] == channels:
            bias = graph.constant(c.array.ravel(), c.name)
            return Tensor(graph.add(layer.op, [*layer.inputs, bias], **layer.attributes), x.order)
    return _entrywise(graph, eqn, inputs)


def _div(graph, eqn, inputs):
    """A sum, which is written as a mean times its count, over that count is the mean."""
    x, c = inputs
    product = graph.producer(x, 'Mul')
    if product and isinstance(c, Constant) and graph.scalar(product.inputs[1]) == c.array.tolist():
        return x._replace(name=product.inputs[0])
    return _entrywise(graph, eqn, inputs)


def _max(graph, eqn, inputs):
    x, c = inputs if isinstance(inputs[0], Tensor) else inputs[::-1]
    if isinstance(c, Constant) and c.array.tolist() == 0:
        return Tensor(graph.add('Relu', [x.name]), x.order)
    return _entrywise(graph, eqn, inputs)


def _select(graph, eqn, inputs):
    """x where it is positive, else a part of it, is leaky relu."""
    which, negative, positive = inputs
    test = graph.producer(which, 'Greater', 'GreaterOrEqual')
    scaled = graph.producer(negative, 'Mul')
    if test and scaled and test.inputs[0] == positive.name and graph.scalar(test.inputs[1]) == 0:
        for slope, x in (scaled.inputs, scaled.inputs[::-1]):
            if x == positive.name and (alpha := graph.scalar(slope)) is not None:
                return Tensor(graph.add('LeakyRelu', [x], alpha=alpha), positive.order)
    return _entrywise(graph, eqn, [which, positive, negative])


def _conv(graph, eqn, inputs):
    x, kernel = inputs
    p = eqn.params
    if isinstance(kernel, Tensor) or p['batch_group_count'] > 1 or max(p['lhs_dilation']) > 1:
        return None
    spec = p['dimension_numbers']
    before, after = zip(*p['padding'], strict=True)
    if min(before + after, default=0) < 0:
        return None
    name = graph.add(
        'Conv',
        [graph.ordered(x, spec.lhs_spec), graph.ordered(kernel, spec.rhs_spec)],
        kernel_shape=[kernel.array.shape[axis] for axis in spec.rhs_spec[2:]],
        strides=p['window_strides'],
        pads=before + after,
        dilations=p['rhs_dilation'],
        group=p['feature_group_count'],
    )
    return Tensor(name, spec.out_spec)


def _dense(graph, eqn, inputs):
    """The last axis of x times a matrix."""
    x, kernel = inputs
    (contracted, axes), batched = eqn.params['dimension_numbers']
    matrix = isinstance(kernel, Constant) and kernel.array.ndim == 2
    if not matrix or any(batched) or contracted != (len(x.order) - 1,):
        return None
    (axis,), order = axes, tuple(range(len(x.order)))
    if len(order) > 2:
        factors = graph.ordered(x, order), graph.ordered(kernel, (axis, 1 - axis))
        return Tensor(graph.add('MatMul', factors), order)
    name, places = x.flat or (graph.ordered(x, order), slice(None))
    weight = graph.constant(kernel.array.transpose(1 - axis, axis)[:, places], kernel.name)
    return Tensor(graph.add('Gemm', [name, weight], transB=1), order)


def _pool(graph, eqn, inputs):
    """Pools the axes between the first and the last."""
    (x,) = inputs
    p = eqn.params
    order = (0, len(x.order) - 1, *range(1, len(x.order) - 1))
    windows = [
        (p['window_dimensions'][axis], p['window_strides'][axis], *p['padding'][axis])
        for axis in order
    ]
    plain = {*p['base_dilation'], *p['window_dilation']} == {1}
    if not plain or windows[:2] != 2 * [(1, 1, 0, 0)]:
        return None
    sizes, strides, before, after = zip(*windows[2:], strict=True)
    if any(pad >= size for size, _, *pads in windows for pad in pads):  # which runtimes refuse
        return None
    name = graph.ordered(x, order)
    attributes = {'kernel_shape': sizes, 'strides': strides, 'pads': before + after}
    if eqn.primitive.name == 'reduce_window_max':
        return Tensor(graph.add('MaxPool', [name], **attributes), order)
    mean = graph.add('AveragePool', [name], count_include_pad=1, **attributes)
    return _times(graph, eqn, Tensor(mean, order), math.prod(sizes))


def _reduce(graph, eqn, inputs):
    (x,) = inputs
    axes = eqn.params['axes']
    count = math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
    if not axes or jax.export.is_symbolic_dim(count):
        return None
    left = [axis for axis in x.order if axis not in axes]
    order = tuple(sorted(left).index(axis) for axis in left)
    attributes = {'axes': [x.order.index(axis) for axis in axes], 'keepdims': 0}
    if eqn.primitive.name == 'reduce_max':
        return Tensor(graph.add('ReduceMax', [x.name], **attributes), order)
    mean = graph.add('ReduceMean', [x.name], **attributes)
    return _times(graph, eqn, Tensor(mean, order), count)


def _times(graph, eqn, mean, count):
    factor = graph.constant(np.asarray(count, eqn.outvars[0].aval.dtype))
    return mean._replace(name=graph.add('Mul', [mean.name, factor]))


def _identity(graph, eqn, inputs):
    return inputs[0] if eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype else None


def _transpose(graph, eqn, inputs):
    (x,) = inputs
    return Tensor(x.name, tuple(eqn.params['permutation'].index(axis) for axis in x.order))


def _concatenate(graph, eqn, inputs):
    if any(isinstance(x, Constant) for x in inputs):  # needs the size of the batch
        return None
    order = inputs[0].order
    axis = order.index(eqn.params['dimension'])
    return Tensor(graph.add('Concat', [graph.ordered(x, order) for x in inputs], axis=axis), order)


def _reshape(graph, eqn, inputs):
    (x,) = inputs
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if len(old) > 2 == len(new) and old[0] == new[0] and x.order[0] == 0:
        places = np.arange(new[1]).reshape(old[1:]).transpose([axis - 1 for axis in x.order[1:]])
        flat = graph.add('Flatten', [x.name], axis=1), places.ravel()
        name = graph.ordered(x, range(len(old)))
        return Tensor(graph.add('Flatten', [name], axis=1), (0, 1), flat)
    return _reshaped(graph, x, new)


def _reshaped(graph, x, shape):
    sizes = graph.constant(np.array(_sizes(shape, batch=-1)))
    name = graph.ordered(x, range(len(x.order)))
    return Tensor(graph.add('Reshape', [name, sizes]), tuple(range(len(shape))))


def _broadcast(graph, eqn, inputs):
    (x,) = inputs
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    sizes = dict(zip(eqn.params['broadcast_dimensions'], old, strict=True))
    middle = tuple(sizes.get(axis, 1) for axis in range(len(new)))
    x = _reshaped(graph, x, middle)
    if middle == new:
        return x
    sizes = graph.constant(np.array(_sizes(new, batch=1)))
    return x._replace(name=graph.add('Expand', [x.name, sizes]))


# primitive -> (graph, equation, inputs) -> its value, or None where that is not translated
RULES = {
    **dict.fromkeys(_ENTRYWISE, _entrywise),
    **dict.fromkeys(('integer_pow', 'square'), _power),
    **dict.fromkeys(('reduce_window_max', 'reduce_window_sum'), _pool),
    **dict.fromkeys(('reduce_max', 'reduce_sum'), _reduce),
    **dict.fromkeys(('convert_element_type', 'copy', 'stop_gradient'), _identity),
    **dict.fromkeys(('reshape', 'squeeze'), _reshape),
    'add': _add,
    'broadcast_in_dim': _broadcast,
    'concatenate': _concatenate,
    'conv_general_dilated': _conv,
    'div': _div,
    'dot_general': _dense,
    'max': _max,
    'select_n': _select,
    'transpose': _transpose,
}
