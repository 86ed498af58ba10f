"""Attacks a checkpoint and saves the adversarial images:

python -m robustprune_jax.attacks --checkpoint RUN/pretrain --eps 0.1 --out FILE.npz
"""

import argparse
import sys
import time
from fractions import Fraction
from pathlib import Path

import jax

from robustprune_jax import data, zoo
from robustprune_jax.attacks import STANDARD, accuracy_after, in_order, save
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m robustprune_jax.attacks', description=__doc__)
    add = parser.add_argument
    add('--checkpoint', required=True, help='a folder of a run, a PyTorch file, a name of the zoo')
    add('--dataset', default='digits', help='a data set of the config, whose test images are taken')
    add('--dir', default='', help='where its files are')
    add('--examples', type=int, default=0, help='the first N test images; default: all')
    add('--eps', type=lambda text: float(Fraction(text)), required=True, help='0.1, or 8/255')
    add('--norm', default='linf', help='linf or l2')
    add('--attacks', default=','.join(STANDARD), help='default: %(default)s')
    add('--batch_size', type=int, default=128)
    add('--seed', type=int, default=0)
    add('--out', help='the .npz of images, labels, adversarial images, and what broke each')
    args = parser.parse_args(argv)
    try:
        _attack(args, tuple(args.attacks.split(',')))
    except (ValueError, OSError) as error:
        sys.exit(f'attacks: {error}')


def _attack(args, attacks):
    if args.out and Path(args.out).suffix != '.npz':
        raise ValueError(f'--out is {args.out}: expected a name that ends in .npz')
    variables, meta = zoo.read(args.checkpoint)
    network = logits_fn(create_model(meta['arch'], meta['num_classes']), variables)
    images, labels = data.first_test_images(
        args.dataset, args.dir, meta['image_shape'], meta['num_classes'], args.examples
    )
    started = time.monotonic()
    adversarial, broken_by = in_order(
        network,
        jax.random.key(args.seed),
        images,
        labels,
        eps=args.eps,
        norm=args.norm,
        attacks=attacks,
        batch_size=args.batch_size,
    )
    for name, accuracy in accuracy_after(broken_by, attacks).items():
        print(f'{100 * accuracy:5.1f} %  after {name}')
    print(
        f'{len(labels)} images, {args.norm}, eps {args.eps:g}, {time.monotonic() - started:.0f} s'
    )
    if args.out:
        save(Path(args.out), images, labels, adversarial, broken_by)


if __name__ == '__main__':
    main()
