"""Makes a checkpoint of a PyTorch file, for `--config.source` of main.py:

`python -m conversion.from_torch --pth FILE --out DIR [--arch NAME] [--density K]`

A network of your own, --arch=package.module:Name, needs --names, its name table, unless the tensors
are named by its Flax paths, as conversion.to_torch does without a table.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence

import numpy as np

from robustprune_jax.config import TRAINED
from robustprune_jax.pruning import sparsity
from robustprune_jax.training import checkpoint

from .files import read_checkpoint
from .fit import (
    count_channels,
    count_classes,
    is_named_by_paths,
    likely_architectures,
    own_inputs,
)
from .names import TABLES, Layer, draft, read_table
from .state_dict import import_state_dict, masks_of_zeros
from .summary import line, summarise
from .targets import unwrapped


def import_checkpoint(
    path: str | os.PathLike,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    density: float | None = None,
    phase: str | None = None,
    method: str | None = None,
    image_size: int | None = None,
    names: Sequence[Layer] | None = None,
) -> tuple[dict, dict, dict]:
    """Returns (variables, meta, summary) of the network in a PyTorch or safetensors file.

    arch: default: the one that the file names, or else the only one that its tensors fit.
    density: the kept fraction; masked checkpoints need it. Of dense ones the zeros are the masks;
    default: where more than a hundredth of the weights is 0, the fraction of the others, else 1.
    phase: what the network comes from; default: finetune where it is pruned, pretrain elsewhere.
    method: by what it was pruned, such as 'hydra', where that is known.
    image_size: pixels; default: what the first dense layer needs, else 224 for ImageNet's
    architectures and 32 for the others; of tensors named by Flax paths the first of fit.IMAGE_SIZES
    that fits. names: the name table of a network of your own, `arch`; default: the Flax paths.
    meta is what checkpoint.save_network needs; the summary is that of conversion.summary.
    Raises ValueError where the file is not a network of `arch`, or fits several architectures.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f'image_size is {image_size}: must be at least 1 pixel')
    contents, fields = read_checkpoint(path)
    state_dict, _ = unwrapped(contents)
    if names and not arch:
        raise ValueError('a name table needs the network that it is of: give --arch')
    arch = arch or _find_arch(state_dict, fields)
    if not names and ':' in arch and is_named_by_paths(state_dict):
        variables = import_state_dict(contents, None, density=density)
        num_classes, image_shape = own_inputs(variables, arch, num_classes, image_size)
    else:
        names = names or arch
        variables = import_state_dict(contents, names, num_classes=num_classes, density=density)
        num_classes = count_classes(state_dict, names)
        size = image_size or _image_size(state_dict, names)
        image_shape = [size, size, count_channels(state_dict, names)]
    if density is None:
        masks = masks_of_zeros(variables['params'])
        found = sparsity({'masks': masks})['total']['density']
        if found < 0.99:  # else no more than some weights that died
            variables['masks'], density = masks, float(f'{found:.3g}')
    pruned = density is not None and density < 1
    meta = {
        'arch': arch,
        'num_classes': num_classes,
        'image_shape': image_shape,
        'phase': phase or ('finetune' if pruned else 'pretrain'),
        'method': method if pruned else None,
        'density': density if pruned else None,
        'epoch': _epoch(fields, path),
    }
    return variables, meta, summarise(path, arch, state_dict, variables)


def _epoch(fields, path):
    try:
        return int(np.int64(int(fields.get('epoch', 0))))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: its field 'epoch' is no whole number") from None


def _find_arch(state_dict, fields):
    arch = fields.get('arch')
    if isinstance(arch, str) and arch in TABLES:
        return arch
    if is_named_by_paths(state_dict):  # a file does not decide what is imported
        raise ValueError(
            f'the tensors have the Flax paths of a network of your own (arch: {arch!r:.99}): give '
            '--arch=package.module:Name'
        )
    likely = likely_architectures(state_dict)
    if not likely:
        rows = ', '.join(json.dumps(layer) for layer in draft(state_dict))
        raise ValueError(
            'the tensors fit no known architecture: for a network of your own give '
            f'--arch=package.module:Name and, corrected, in a file, --names: [{rows}]'
        )
    if len(likely) > 1:
        raise ValueError(f'the tensors fit {" and ".join(likely)}: give --arch')
    return likely[0]


def _image_size(state_dict, arch):
    for layer in TABLES[arch] if isinstance(arch, str) else arch:
        if layer.kind == 'flatten' and layer.pixels is None:
            width = state_dict[f'{layer.torch}.weight'].shape[1]
            channels = layer.channels or count_channels(state_dict, arch)
            # All of these halve the image twice, but for the linear ones.
            return math.isqrt(width // channels) * (1 if layer.channels is None else 4)
    return 224 if isinstance(arch, str) and arch.startswith('ResNet') else 32


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.from_torch', description=__doc__)
    parser.add_argument('--pth', required=True, help='.pth, .pth.tar, .pt or .safetensors')
    parser.add_argument('--out', required=True, help='the checkpoint folder to write')
    parser.add_argument('--arch', help='default: found from the file')
    parser.add_argument('--names', help='JSON name table of a network of your own')
    parser.add_argument('--density', type=float, help='the fraction of weights kept')
    parser.add_argument('--num_classes', type=int, help='checked where given')
    parser.add_argument('--phase', choices=TRAINED, help='default: finetune if pruned, or pretrain')
    parser.add_argument('--method', help='what pruned it, such as hydra, where that is known')
    parser.add_argument('--image_size', type=int, help='pixels; default: from the architecture')
    args = parser.parse_args(argv)
    try:
        variables, meta, summary = import_checkpoint(
            args.pth, arch=args.arch, num_classes=args.num_classes, density=args.density,
            phase=args.phase, method=args.method, image_size=args.image_size,
            names=read_table(args.names) if args.names else None,
        )  # fmt: skip
        checkpoint.save_network(args.out, variables, meta)
    except (ValueError, OSError) as error:
        sys.exit(f'from_torch: {error}')
    height, width, channels = meta['image_shape']
    print(
        f'{args.out}: {line(summary)} in {args.pth}; a checkpoint of phase {meta["phase"]}, '
        f'{meta["num_classes"]} classes, images {height}x{width}x{channels}'
    )


if __name__ == '__main__':
    main()
