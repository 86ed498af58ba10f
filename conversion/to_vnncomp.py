"""Writes a checkpoint and test images as a benchmark of VNN-COMP, for any verifier to decide:

`python -m conversion.to_vnncomp --checkpoint RUN/finetune --eps 2/255 --examples 100 --out DIR`

DIR/network.onnx, DIR/vnnlib/image_0.vnnlib and so on, one for each image; DIR/instances.csv names
them, a line each: the network, the property, the seconds.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from robustprune_jax import data
from robustprune_jax.models import create_model
from robustprune_jax.runtime.files import write_atomically

from .checkpoint_flag import add_checkpoint, read_network
from .to_onnx import export_onnx
from .vnnlib import to_vnnlib


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m conversion.to_vnncomp', description=__doc__)
    add_checkpoint(parser)
    add = parser.add_argument
    add('--dataset', default='digits', help='a data set of the config, whose test images are taken')
    add('--dir', default='', help='where its files are')
    add('--examples', type=int, default=100, help='the first N test images, 0: all; default: 100')
    add('--eps', type=Fraction, required=True, help='of the l_inf ball: 0.1, or 2/255')
    add('--timeout', type=int, default=120, help='seconds an image; default: %(default)s')
    add('--out', type=Path, required=True, help='the folder to write')
    args = parser.parse_args(argv)
    try:
        _write(args)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        sys.exit(f'to_vnncomp: {error}')


def _write(args):
    variables, meta = read_network(args)
    shape, classes = meta['image_shape'], meta['num_classes']
    images, labels = data.first_test_images(args.dataset, args.dir, shape, classes, args.examples)
    properties = {
        f'vnnlib/image_{i}.vnnlib': to_vnnlib(image, label, eps=args.eps, num_classes=classes)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    }
    instances = [f'network.onnx,{name},{args.timeout}\n' for name in properties]
    args.out.mkdir(parents=True, exist_ok=True)
    export_onnx(variables, create_model(meta['arch'], classes), shape, args.out / 'network.onnx')
    for name, text in {**properties, 'instances.csv': ''.join(instances)}.items():
        write_atomically(args.out / name, text)
    print(f'{args.out}: {meta["arch"]}, {len(labels)} images of {args.dataset}, eps {args.eps}')


if __name__ == '__main__':
    main()
