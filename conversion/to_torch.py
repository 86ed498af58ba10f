"""Writes a checkpoint as a PyTorch file:

python -m conversion.to_torch --checkpoint DIR --out FILE.pth.tar
"""

import argparse
import os
import sys
from pathlib import Path

from robustprune_jax import checkpoint
from robustprune_jax.masks import sparsity

from .state_dict import LAYOUTS, export_state_dict
from .targets import TARGETS
from .torch_format import save_pth


def export_checkpoint(
    variables: dict,
    meta: dict,
    path: str | os.PathLike,
    *,
    layout: str = 'dense',
    target: str = 'hydra',
) -> dict:
    """Writes the network to `path` with the fields of the original's files, and returns a summary.

    The file holds {'epoch', 'arch', 'state_dict', 'best_prec1', 'optimizer'}; best_prec1 is in
    percent, the optimizer empty. meta: at least 'arch'.
    Returns {'arch', 'layout', 'target', 'tensors', 'parameters' (buffers not counted), 'kept',
    'prunable', 'density' (kept / prunable), 'bytes' (of the file)}.
    Raises ValueError where the variables are not those of meta['arch'].
    """
    state_dict = export_state_dict(variables, meta['arch'], layout=layout, target=target)
    fields = {
        'epoch': int(meta.get('epoch', 0)),
        'arch': meta['arch'],
        'state_dict': state_dict,
        'best_prec1': float(meta.get('best_prec1', 0)),
        'optimizer': {},
    }
    save_pth(path, fields)
    buffers = ('running_mean', 'running_var', 'num_batches_tracked', 'popup_scores')
    parameters = [array for name, array in state_dict.items() if not name.endswith(buffers)]
    return {
        'arch': meta['arch'],
        'layout': layout,
        'target': target,
        'tensors': len(state_dict),
        'parameters': sum(array.size for array in parameters),
        **sparsity(variables)['total'],
        'bytes': Path(path).stat().st_size,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_torch', description=__doc__)
    parser.add_argument('--checkpoint', required=True, help='the checkpoints folder of a phase')
    parser.add_argument('--which', default='latest', help="'latest' (default), 'best' or a step")
    parser.add_argument('--out', required=True, help='FILE.pth.tar')
    parser.add_argument('--layout', choices=LAYOUTS, default='dense')
    parser.add_argument('--target', choices=TARGETS, default='hydra')
    args = parser.parse_args(argv)
    try:
        which = int(args.which) if args.which.isdigit() else args.which
        variables, meta = checkpoint.load(args.checkpoint, which)
        done = export_checkpoint(variables, meta, args.out, layout=args.layout, target=args.target)
    except (ValueError, OSError) as error:
        sys.exit(f'to_torch: {error}')
    print(
        f'{args.out}: {done["arch"]}, {done["layout"]} layout, {done["tensors"]} tensors, '
        f'{done["parameters"]:,} parameters, density {done["density"]:.4g} '
        f'({done["kept"]:,} of {done["prunable"]:,} weights kept), {done["bytes"]:,} bytes'
    )


if __name__ == '__main__':
    main()
