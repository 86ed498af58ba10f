"""Writes a checkpoint as a C file, without anything that is not in it:

`python -m conversion.to_c --checkpoint DIR --out net.c`
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from robustprune_jax.models import create_model
from robustprune_jax.runtime.files import replacing, write_atomically

from .c import DENSE_ABOVE, SEPARATE, c_source, main_program
from .checkpoint_flag import add_checkpoint, read_network
from .compact import compact
from .graph import Graph


def is_large(graph: Graph) -> bool:
    """Returns whether the weights are better kept out of the text, which is slow to compile."""
    return sum(np.count_nonzero(a) for a in graph.initialisers.values()) > SEPARATE


def write_c(
    graph: Graph,
    path: str | os.PathLike,
    *,
    constants: str | os.PathLike | None = None,
    name: str = 'net',
    program: bool = False,
    dense_above: float = DENSE_ABOVE,
) -> int:
    """Writes the graph's C file, see c_source, and returns its bytes and those of `constants`,
    where its weights then are; program: with a main function. Raises as c_source does."""
    source = c_source(graph, name, constants is not None, dense_above)
    text = source.text + (main_program(name, constants is not None) if program else '')
    if constants is not None:
        with replacing(constants) as temporary:
            temporary.write_bytes(source.data)
    write_atomically(Path(path), text)
    return len(text) + len(source.data)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_c', description=__doc__)
    add_checkpoint(parser)
    parser.add_argument('--out', required=True, help='FILE.c')
    parser.add_argument('--name', default='net', help='of its functions; default net')
    parser.add_argument(
        '--main', action='store_true', help='add a program: float32 images in, lines of logits out'
    )
    parser.add_argument('--weights', help='FILE.bin: keep them there, not in the C file')
    parser.add_argument(
        '--dense_above', type=float, default=DENSE_ABOVE,
        help='dense layers with more than this fraction of their weights left multiply with all; '
        'default %(default)s',
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not args.name.isidentifier():
        sys.exit(f'to_c: --name is {args.name!r}: expected letters, digits and _, as C has names')
    try:
        variables, meta = read_network(args)
        module = create_model(meta['arch'], meta['num_classes'])
        graph = compact(variables, module, meta['image_shape'])
        size = write_c(
            graph, args.out, constants=args.weights, name=args.name, program=args.main,
            dense_above=args.dense_above,
        )  # fmt: skip
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f'to_c: {error}')
    nonzero = sum(int((graph.initialisers[n.inputs[1]] != 0).sum()) for n in graph.layers())
    print(f'{args.out}: {meta["arch"]}, {nonzero:,} weights, {size:,} bytes')


if __name__ == '__main__':
    main()
