"""Writes a checkpoint as an ONNX file:

`python -m conversion.to_onnx --checkpoint DIR --out FILE.onnx`
"""

import argparse
import os
import sys
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
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import is_kernel
from robustprune_jax.runtime.files import replacing
from robustprune_jax.training import checkpoint

from .onnx_graph import Constant, Graph, Tensor, on_host
from .onnx_rules import RULES, translate
from .summary import line, summarise

_OPSET, _IR_VERSION = 17, 8  # of 2022, for runtimes and verifiers that are not the newest
_LIBRARIES = tuple(os.path.dirname(library.__file__) + os.sep for library in (flax, jax))


def export_onnx(
    variables: dict, module: nn.Module, image_shape: Sequence[int], path: str | os.PathLike
) -> dict:
    """Writes the dense network to `path` and returns a summary, see conversion.summary.

    Its input `images` is float32 [batch, C, H, W] in [0, 1], its output `logits` [batch, K], for
    any batch. Weights are initialisers under their Flax paths, in PyTorch's layout, pruned ones
    exact zeros. image_shape: (H, W, C); the module is called with train=False.
    Raises NotImplementedError, naming the primitive, the layer and the line, where the module does
    something that is not translated, ValueError where it returns something else than logits or has
    no kernels, and ImportError where onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError('this needs the package onnx: pip install onnx') from None
    params = flatten_dict(variables.get('params', {}))
    if not any(is_kernel(path, leaf) for path, leaf in params.items()):
        raise ValueError('the network has no kernels')
    graph, shape = _trace(module, variables, image_shape)
    height, width, channels = image_shape
    name = module.name or type(module).__name__
    describe, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node(node.op, node.inputs, [output], output, **node.attributes)
                for output, node in graph.nodes.items()
            ],
            name,
            [describe('images', float32, ['batch', channels, height, width])],
            [describe('logits', float32, ['batch', *shape[1:]])],
            [onnx.numpy_helper.from_array(a, name) for name, a in graph.initialisers.items()],
        ),
        producer_name='robustprune_jax',
        opset_imports=[onnx.helper.make_opsetid('', _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return summarise(path, name, flatten_dict(variables['params'], sep='/'), variables)


def _trace(module, variables, image_shape):
    """The network's graph, and the shape of its logits."""
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
    graph = Graph()
    outputs = interpret(
        closed,
        [*weights, Tensor('images', (0, 3, 1, 2))],
        partial(_equation, graph),
        lambda value: Constant(on_host(value)),
    )
    if isinstance(outputs[0], Constant):
        raise ValueError('the network must return logits that depend on its images')
    graph.finish(graph.ordered(outputs[0], range(2)), 'logits')
    return graph, out.shape


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_onnx', description=__doc__)
    parser.add_argument('--checkpoint', required=True, help='the folder of a phase')
    parser.add_argument('--which', default='latest', help="'latest' (default), 'best' or a step")
    parser.add_argument('--out', required=True, help='FILE.onnx')
    args = parser.parse_args(argv)
    try:
        which = int(args.which) if args.which.isdigit() else args.which
        variables, meta = checkpoint.load(args.checkpoint, which)
        module = create_model(meta['arch'], meta['num_classes'])
        summary = export_onnx(variables, module, meta['image_shape'], args.out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'to_onnx: {error}')
    height, width, channels = meta['image_shape']
    print(f'{args.out}: {line(summary)}, images [batch, {channels}, {height}, {width}]')


if __name__ == '__main__':
    main()
