"""Writes a checkpoint as a C file, without anything that is not in it:

`python -m conversion.to_c --checkpoint DIR --out net.c`
"""

import argparse
import sys
from pathlib import Path

from robustprune_jax.models import create_model
from robustprune_jax.runtime.files import write_atomically

from .c import c_source, main_program
from .checkpoint_flag import add_checkpoint, read_network
from .compact import compact


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_c', description=__doc__)
    add_checkpoint(parser)
    parser.add_argument('--out', required=True, help='FILE.c')
    parser.add_argument('--name', default='net', help='of its functions; default net')
    parser.add_argument(
        '--main', action='store_true', help='add a program: float32 images in, lines of logits out'
    )
    args = parser.parse_args(argv)
    if not args.name.isidentifier():
        sys.exit(f'to_c: --name is {args.name!r}: expected letters, digits and _, as C has names')
    try:
        variables, meta = read_network(args)
        module = create_model(meta['arch'], meta['num_classes'])
        graph = compact(variables, module, meta['image_shape'])
        text = c_source(graph, args.name) + (main_program(args.name) if args.main else '')
        write_atomically(Path(args.out), text)
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f'to_c: {error}')
    nonzero = sum(int((graph.initialisers[n.inputs[1]] != 0).sum()) for n in graph.layers())
    print(f'{args.out}: {meta["arch"]}, {nonzero:,} weights, {len(text):,} bytes')


if __name__ == '__main__':
    main()
