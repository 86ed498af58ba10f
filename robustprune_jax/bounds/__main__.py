"""Decides a property of a network, as VNN-COMP states and answers them:

python -m robustprune_jax.bounds --onnx network.onnx --vnnlib image_0.vnnlib --timeout 120

Prints unsat, where no input has the outputs that the property describes, sat and such an input,
timeout or unknown.
"""

import argparse
import sys

import jax
import numpy as np

from conversion import read_onnx, read_vnnlib
from conversion.evaluate import logits_fn
from robustprune_jax.bounds import decide, without_error_term


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m robustprune_jax.bounds', description=__doc__)
    add = parser.add_argument
    add('--onnx', required=True, help='the network')
    add('--vnnlib', required=True, help='the property, VNN-LIB 1.0')
    add('--timeout', type=float, default=120, help='seconds; default: %(default)s')
    args = parser.parse_args(argv)
    try:
        graph, regions = read_onnx(args.onnx), read_vnnlib(args.vnnlib)
        network, shape = logits_fn(graph), graph.image_shape
        rounds = without_error_term(network, jax.ShapeDtypeStruct(shape, np.float32))
        answer = decide(network, regions, image_shape=shape, timeout=args.timeout, sound=not rounds)
    except (ValueError, OSError, ImportError, NotImplementedError, MemoryError) as error:
        sys.exit(f'bounds: {error}')
    print(answer.status)
    if answer.status == 'sat':
        values = [(f'X_{i}', x) for i, x in enumerate(answer.inputs)]
        values += [(f'Y_{j}', y) for j, y in enumerate(answer.outputs)]
        print('(' + '\n'.join(f'({name} {value:.9g})' for name, value in values) + ')')
    if rounds:
        print(f'bounds: not sound in floating point, for {", ".join(rounds)}', file=sys.stderr)
    if answer.reason:
        print(f'bounds: {answer.reason}', file=sys.stderr)


if __name__ == '__main__':
    main()
