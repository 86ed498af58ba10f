"""Writes a checkpoint as a PyTorch file:

`python -m conversion.to_torch --checkpoint DIR --out FILE.pth.tar`
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from robustprune_jax.models import create_model
from robustprune_jax.runtime.files import write_atomically

from .checkpoint_flag import add_checkpoint, read_network
from .compact import compact
from .files import write_checkpoint
from .names import TABLES, Layer, read_table
from .state_dict import LAYOUTS, export_state_dict
from .summary import line, summarise
from .targets import TARGETS
from .torch_module import torch_module


def export_checkpoint(
    variables: dict,
    meta: dict,
    path: str | os.PathLike,
    *,
    layout: str = 'dense',
    target: str = 'hydra',
    names: Sequence[Layer] | None = None,
    sparse: str | None = None,
) -> dict:
    """Writes the network to `path` and returns a summary, see conversion.summary.

    The file holds {'epoch', 'arch', 'best_prec1' (percent), 'optimizer' (empty), 'state_dict'} as
    the original's do, for target 'torchvision' the state dict alone; a .safetensors file holds the
    tensors, the rest as text. meta: at least 'arch'; where that is an architecture of your own,
    names is its table (default: the tensors' Flax paths). sparse: 'float32' or 'float16': a
    safetensors file of the weights that are not 0, in that type, see conversion.sparse.
    Raises ValueError where the variables are not those of meta['arch'].
    """
    arch = names or table_of(meta['arch'])
    state_dict = export_state_dict(variables, arch, layout=layout, target=target)
    fields = {
        'epoch': int(meta.get('epoch', 0)),
        'arch': meta['arch'],
        'best_prec1': float(meta.get('best_prec1', 0)),
        'optimizer': {},
    }
    write_checkpoint(path, state_dict, fields, bare=TARGETS[target].bare, sparse=sparse)
    return summarise(path, meta['arch'], state_dict, variables)


def export_compact(variables: dict, meta: dict, path: str | os.PathLike) -> Path:
    """Writes the network without what has no effect, see conversion.compact, to `path`: a state
    dict; returns the file beside it, `path` with the suffix .py, that defines the module Network
    for it in ordinary layers. Raises NotImplementedError where the network is not translated."""
    module = create_model(meta['arch'], meta['num_classes'])
    text, state_dict = torch_module(compact(variables, module, meta['image_shape']))
    code = Path(str(path).removesuffix('.tar')).with_suffix('.py')
    write_checkpoint(path, state_dict, {}, bare=True)
    write_atomically(code, text)
    return code


def table_of(arch: str) -> str | None:
    """Returns the architecture where its tensors have PyTorch's names, None where they have their
    Flax paths."""
    return arch if arch in TABLES else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_torch', description=__doc__)
    add_checkpoint(parser)
    parser.add_argument('--out', required=True, help='FILE.pth.tar or FILE.safetensors')
    parser.add_argument('--layout', choices=LAYOUTS, default='dense')
    parser.add_argument('--target', choices=TARGETS, default='hydra', help='who will load it')
    parser.add_argument('--names', help='JSON name table of an architecture of your own')
    parser.add_argument(
        '--sparse', nargs='?', const='float32', choices=('float32', 'float16'),
        help='only the weights that are not 0, in this type (default float32): FILE.safetensors',
    )  # fmt: skip
    parser.add_argument(
        '--compact', action='store_true',
        help='leave out what has no effect on the logits, and write FILE.py, which defines what is '
        'left in layers of torch.nn',
    )  # fmt: skip
    args = parser.parse_args(argv)
    others = args.sparse, args.names, args.layout != 'dense', args.target != 'hydra'
    if args.compact and any(others):
        parser.error('--compact goes with --checkpoint, --which and --out alone')
    try:
        variables, meta = read_network(args)
        if args.compact:
            code = export_compact(variables, meta, args.out)
            print(f'{args.out}: {Path(args.out).stat().st_size:,} bytes, for Network in {code}')
            return
        summary = export_checkpoint(
            variables, meta, args.out, layout=args.layout, target=args.target,
            names=read_table(args.names) if args.names else None, sparse=args.sparse,
        )  # fmt: skip
    except (ValueError, OSError, NotImplementedError) as error:
        sys.exit(f'to_torch: {error}')
    print(f'{args.out}: {line(summary)}, {args.layout} layout for {args.target}')


if __name__ == '__main__':
    main()
