"""What complete verification proves, and how fast:

    python benchmarks/verify.py --arch=cifar_model --network=FILE --images=X.npy --labels=Y.npy \\
        --eps=0.00784 --timeout=120 [--first=50] [--mean=R,G,B --std=R,G,B]

FILE: a PyTorch state dict, or a checkpoint of ours; X: [N, H, W, C] in [0, 1]; --mean and --std: in
0..255, where the network reads normalised images. One line for each image that CROWN and PGD leave
open, then the counts, and how many relus CROWN's bounds leave undecided.
"""

import argparse
import time
from collections import Counter

import numpy as np
from jax.tree_util import Partial

from conversion import import_state_dict, load_pth
from robustprune_jax.bounds import intermediate, verify
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn


def normalised(network, mean, std, images):
    return network((images - mean) / std)


def network_of(flags) -> Partial:
    state_dict = load_pth(flags.network)
    state_dict = state_dict.get('state_dict', state_dict)
    network = logits_fn(create_model(flags.arch), import_state_dict(state_dict, flags.arch))
    if flags.mean is None:
        return network
    mean, std = (np.float32(x.split(',')) / np.float32(255) for x in (flags.mean, flags.std))
    return Partial(normalised, network, mean, std)


def flags():
    parser = argparse.ArgumentParser(description='Complete verification of one network.')
    for name in ('arch', 'network', 'images', 'labels'):
        parser.add_argument(f'--{name}', required=True)
    parser.add_argument('--eps', type=float, required=True)
    parser.add_argument('--timeout', type=float, default=120.0, help='seconds per image')
    parser.add_argument('--first', type=int, help='how many images, all by default')
    parser.add_argument('--mean')
    parser.add_argument('--std')
    return parser.parse_args()


def main() -> None:
    given = flags()
    network = network_of(given)
    images = np.load(given.images)[: given.first]
    labels = np.load(given.labels)[: given.first].astype(np.int32)
    started, cpu = time.monotonic(), time.process_time()
    verdicts = verify(network, images, labels, eps=given.eps, timeout=given.timeout)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    for i, v in enumerate(verdicts):
        if v.by in ('alpha_crown', 'branching', ''):
            print(
                f'image {i:4}  {v.status:10} {v.by or v.reason:12} bound {v.bound:8.4f} '
                f'{v.domains:7} domains {v.seconds:7.1f} s'
            )
    branched = [v for v in verdicts if v.domains]
    domains = sum(v.domains for v in branched)
    rate = domains / max(sum(v.seconds for v in branched), 1e-9)
    statuses, stages = (Counter(getattr(v, f) for v in verdicts) for f in ('status', 'by'))
    print(', '.join(f'{n} {name} ({n / len(verdicts):.1%})' for name, n in statuses.items()))
    print('decided by', ', '.join(f'{name}: {n}' for name, n in stages.items() if name))
    print(f'{domains} domains, {rate:.0f} a second; {seconds:.0f} s in all, {cpu:.0f} s of CPU')
    layers = intermediate(network, images, eps=given.eps)
    undecided = sum(float(layer.unstable.mean()) for layer in layers)
    units = sum(layer.lower[0].size for layer in layers)
    print(f'{undecided:.0f} of {units} units undecided, the mean over images')


if __name__ == '__main__':
    main()
