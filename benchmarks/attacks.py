r"""The ensemble beside the public AutoAttack, on a mnist_model and its torch export.

git clone https://github.com/fra31/auto-attack  # the caller's own copy: it is not on PyPI
python benchmarks/attacks.py --autoattack_dir=auto-attack --checkpoint=runs/fashion_mnist/pretrain

Each attack alone on the same images, then all in order: robust accuracy, seconds on the same cores,
their ratio (above 1: ours is faster). Ours includes its compilation.
"""

import argparse
import sys
import time

import jax
import numpy as np
import torch

from conversion import export_state_dict
from robustprune_jax import attacks, data
from robustprune_jax.config import default
from robustprune_jax.data.augment import to_float
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.training import checkpoint

NORMS = {'linf': 'Linf', 'l2': 'L2'}


def torch_network(variables: dict) -> torch.nn.Module:
    nn = torch.nn
    state_dict = export_state_dict(variables, 'mnist_model', layout='dense', target='hydra')
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    network.load_state_dict({name: torch.tensor(a) for name, a in state_dict.items()})
    return network.eval()


def ours(network, images, labels, names, args):
    _, accuracy = attacks.standard(
        network, jax.random.key(0), images, labels, eps=args.eps, norm=args.norm, attacks=names,
        batch_size=args.batch_size,
    )  # fmt: skip
    return min(accuracy.values())


def theirs(network, images, labels, names, args):
    from autoattack import AutoAttack

    images = torch.tensor(images.transpose(0, 3, 1, 2))
    labels = torch.tensor(labels).long()
    ensemble = AutoAttack(
        network, norm=NORMS[args.norm], eps=args.eps, version='custom', attacks_to_run=list(names),
        device='cpu', verbose=False, seed=0,
    )  # fmt: skip
    # What its version 'standard' sets.
    ensemble.apgd.n_restarts = ensemble.apgd_targeted.n_restarts = ensemble.fab.n_restarts = 1
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = 9
    ensemble.square.n_queries = 5000
    found = ensemble.run_standard_evaluation(images, labels, bs=args.batch_size)
    with torch.no_grad():
        return float((network(found).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--autoattack_dir', required=True)
    parser.add_argument('--checkpoint', required=True)
    parser.add_argument('--dataset', default='idx')
    parser.add_argument('--dir', default='/usr/share/datasets/fashion-mnist')
    parser.add_argument('--examples', type=int, default=1000)
    parser.add_argument('--eps', type=float, default=0.1)
    parser.add_argument('--norm', default='linf', choices=NORMS)
    parser.add_argument('--batch_size', type=int, default=250)
    parser.add_argument('--rows', default=','.join([*attacks.STANDARD, 'standard']))
    args = parser.parse_args()
    sys.path.insert(0, args.autoattack_dir)
    config = default()
    config.dataset.update(name=args.dataset, dir=args.dir)
    test = data.load(config.dataset).test
    images = np.asarray(to_float(np.asarray(test.images[: args.examples])))
    labels = test.labels[: args.examples].astype(np.int32)
    variables, meta = checkpoint.load(args.checkpoint)
    pair = logits_fn(create_model(meta['arch']), variables), torch_network(variables)
    print(f'{args.checkpoint}: {len(labels)} images, {args.norm}, eps {args.eps:g}')
    print(f'{"":8}  {"ours %":>6}  {"theirs %":>8}  {"ours s":>6}  {"theirs s":>8}  ratio')
    for row in args.rows.split(','):
        names = attacks.STANDARD if row == 'standard' else (row,)
        accuracies, seconds = [], []
        for run, network in zip((ours, theirs), pair, strict=True):
            started = time.perf_counter()
            accuracies.append(100 * run(network, images, labels, names, args))
            seconds.append(time.perf_counter() - started)
        print(
            f'{row:8}  {accuracies[0]:6.1f}  {accuracies[1]:8.1f}  {seconds[0]:6.0f}  '
            f'{seconds[1]:8.0f}  {seconds[1] / seconds[0]:5.2f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
