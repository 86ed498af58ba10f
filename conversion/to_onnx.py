"""Writes a checkpoint as an ONNX file:

`python -m conversion.to_onnx --checkpoint DIR --out FILE.onnx`
"""

import argparse
import os
import sys
from collections.abc import Sequence

import flax.linen as nn
from flax.traverse_util import flatten_dict

from robustprune_jax.models import create_model
from robustprune_jax.runtime.files import replacing

from .checkpoint_flag import add_checkpoint, read_network
from .compact import compact
from .evaluate import shapes
from .graph import Graph
from .summary import line, summarise
from .trace import trace

_OPSET, _IR_VERSION = 17, 8  # of 2022, for runtimes and verifiers that are not the newest


def export_onnx(
    variables: dict,
    module: nn.Module,
    image_shape: Sequence[int],
    path: str | os.PathLike,
    smaller: bool = False,
) -> dict:
    """Writes the dense network to `path` and returns a summary, see conversion.summary.

    Its input `images` is float32 [batch, C, H, W] in [0, 1], its output `logits` [batch, K], for
    any batch. Weights are initialisers under their Flax paths, in PyTorch's layout, pruned ones
    exact zeros. image_shape: (H, W, C); the module is called with train=False. smaller: without
    what has no effect, see conversion.passes.compact, and with BatchNorm in the kernels.
    Raises NotImplementedError, naming the primitive, the layer and the line, where the module does
    something that is not translated, ValueError where it returns something else than logits or has
    no kernels, and ImportError where onnx is not installed.
    """
    name = module.name or type(module).__name__
    if smaller:
        graph = compact(variables, module, image_shape)
    else:
        graph = trace(module, variables, image_shape)
    write_onnx(graph, path, name)
    return summarise(path, name, flatten_dict(variables['params'], sep='/'), variables)


def write_onnx(graph: Graph, path: str | os.PathLike, name: str = 'network') -> None:
    """Writes a graph to `path`. Raises ImportError where onnx is not installed."""
    try:
        import onnx
    except ImportError:
        raise ImportError('this needs the package onnx: pip install onnx') from None
    describe, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node(node.op, node.inputs, [output], output, **node.attributes)
                for output, node in graph.nodes.items()
            ],
            name,
            [describe('images', float32, ['batch', *graph.image_shape])],
            [describe('logits', float32, ['batch', *shapes(graph)['logits'][1:]])],
            [onnx.numpy_helper.from_array(a, name) for name, a in graph.initialisers.items()],
        ),
        producer_name='robustprune_jax',
        opset_imports=[onnx.helper.make_opsetid('', _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_onnx', description=__doc__)
    add_checkpoint(parser)
    parser.add_argument('--out', required=True, help='FILE.onnx')
    parser.add_argument(
        '--compact', action='store_true', help='leave out what has no effect on the logits'
    )
    args = parser.parse_args(argv)
    try:
        variables, meta = read_network(args)
        module = create_model(meta['arch'], meta['num_classes'])
        summary = export_onnx(variables, module, meta['image_shape'], args.out, args.compact)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'to_onnx: {error}')
    height, width, channels = meta['image_shape']
    print(f'{args.out}: {line(summary)}, images [batch, {channels}, {height}, {width}]')


if __name__ == '__main__':
    main()
