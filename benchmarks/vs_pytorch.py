r"""Training steps beside the original's, as ratios in one run.

git clone https://github.com/inspire-group/hydra  # the caller's own copy: nothing of it is here
python benchmarks/vs_pytorch.py --hydra_dir=hydra [--only=mnist_model,trades]

A step is the original's own trainer on a loader of one batch, and our compiled step on the same
images, in turns, with the same threads. Medians, (least to most), PyTorch's time over ours, our
compilation. `dense` is the original's trainer on plain layers in channels_last, its best case.
`symbolic` bounds images of one batch, `certify` one image by 1,000 noisy copies. The original needs
repairs on current torch; they are made here, at run time.

--memory prints instead the peak resident memory of each side, alone in a process.
"""

import argparse
import contextlib
import importlib
import io
import resource
import statistics
import subprocess
import sys
import time
import types
from unittest.mock import MagicMock

import jax
import numpy as np
import torch
from stepping import training_step

from robustprune_jax import bounds, smoothing
from robustprune_jax.config import default
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import init_scores
from robustprune_jax.runtime import sharding

# our objective -> the original's trainer
TRAINERS = {
    'natural': 'base', 'trades': 'adv', 'smooth': 'smooth', 'crown_ibp': 'crown-ibp',
    'mixtrain': 'mixtrain',
}  # fmt: skip
PHASES = ('pretrain', 'prune', 'finetune')
CASES = [  # network, objective or evaluation, batch, what
    *(('mnist_model', objective, 128, phase) for objective in ('natural', 'trades', 'smooth')
      for phase in (*PHASES, 'dense')),
    *(('cifar_model', 'crown_ibp', 64, phase) for phase in PHASES),
    ('cifar_model', 'mixtrain', 64, 'pretrain'),
    ('cifar_model', 'symbolic', 10, 'evaluate'),
    ('wrn_28_4', 'certify', 100, 'evaluate'),
    *((arch, objective, 32, phase) for arch in ('vgg16_bn', 'wrn_28_4')
      for objective in ('natural', 'smooth', 'trades') for phase in (*PHASES, 'dense')),
]  # fmt: skip
EPS, STEP_SIZE, STEPS, BETA, SIGMA, DENSITY = 0.031, 0.0078, 10, 6.0, 0.25, 0.01


def images_of(arch: str, batch_size: int) -> np.ndarray:
    shape = (28, 28, 1) if arch == 'mnist_model' else (32, 32, 3)
    return np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8)


def ours(arch: str, objective: str, batch_size: int, phase: str):
    """Returns a function that takes a step, and the seconds of its compilation."""
    config = default()
    config.attack.update(eps=EPS, step_size=STEP_SIZE, steps=STEPS)
    config.certified.eps = 0.007
    config.mixtrain.probability = 1.0
    config.objective, config.densities = objective, (DENSITY,)
    config[phase].ramp_epochs = 10.0 if objective == 'crown_ibp' else 0.0
    module = create_model(arch)
    images = images_of(arch, batch_size)
    variables = dict(
        jax.jit(module.init)(jax.random.key(0), np.zeros((1, *images.shape[1:]), np.float32))
    )
    if phase != 'pretrain':
        variables['scores'] = init_scores(variables['params'])
    if phase == 'finetune':
        variables['masks'] = jax.tree.map(
            lambda x: (np.abs(x) >= np.quantile(np.abs(x), 1 - DENSITY)).astype(np.float32),
            variables.pop('scores'),
        )
    batch = {'image': images, 'label': np.arange(batch_size, dtype=np.int32) % 10}
    mesh = sharding.make_mesh()
    update, first_state = training_step(config, phase, module, variables, images.shape[1:], mesh)
    state = first_state(variables, batch_shape=images.shape)
    started = time.monotonic()
    update = update.lower(state, batch, jax.random.key(1)).compile()
    seconds = time.monotonic() - started

    def take():
        nonlocal state
        state, metrics = update(state, batch, jax.random.key(1))
        jax.block_until_ready(metrics)

    return take, seconds


def repair(hydra_dir: str) -> None:
    """Makes the original importable on current packages."""
    sys.path.insert(0, hydra_dir)
    # It only loads data, and draws a grid of images.
    sys.modules['torchvision'] = MagicMock()
    import scipy.stats
    import utils.eval

    scipy.stats.binom_test = scipy.stats.binomtest
    select = torch.Tensor.masked_select
    torch.Tensor.masked_select = lambda x, mask: select(x, mask.bool())

    def accuracy(output, target, topk):
        ranked = output.topk(max(topk), 1).indices == target[:, None]
        return [100 * ranked[:, :k].float().sum()[None] / len(target) for k in topk]

    utils.eval.accuracy = accuracy


def theirs(arch: str, objective: str, batch_size: int, phase: str, dense: bool):
    """Returns a function that takes a step of the original's trainer."""
    import models
    from utils.model import get_layers, prepare_model

    settings = types.SimpleNamespace(
        exp_mode=phase, freeze_bn=False, scores_init_type='kaiming_normal', dataset='CIFAR10',
        batch_size=batch_size // 2 if objective == 'crown_ibp' else batch_size, print_freq=1000,
        epsilon=0.007 if objective == 'crown_ibp' else EPS, step_size=STEP_SIZE, num_steps=STEPS,
        beta=BETA, noise_std=SIGMA, clip_min=0.0, clip_max=1.0, distance='l_inf',
        k=1.0 if phase == 'pretrain' else DENSITY, starting_epsilon=0.0, schedule_start=0,
        schedule_length=20, mixtraink=5, interval_weight=0.1,
    )  # fmt: skip
    trainer = importlib.import_module(f'trainer.{TRAINERS[objective]}')
    if objective == 'mixtrain':  # every batch has symbolic bounds
        draw = types.SimpleNamespace(uniform=lambda: 0.0, randint=np.random.randint)
        trainer.np = types.SimpleNamespace(random=draw)
    with contextlib.redirect_stdout(io.StringIO()):
        layers = get_layers('dense' if dense else 'subnet')
    with contextlib.redirect_stdout(io.StringIO()):
        network = getattr(models, arch)(*layers, 'kaiming_normal', num_classes=10)
        if not dense:
            prepare_model(network, settings)
    images = torch.tensor(images_of(arch, batch_size).transpose(0, 3, 1, 2).copy()) / 255
    if dense and not arch.endswith('model'):  # its CNNs flatten with a view, which needs NCHW
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    trained = [p for p in network.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    loader = [(images, torch.arange(batch_size) % 10)]
    writer = types.SimpleNamespace(add_image=lambda *_: None, add_scalar=lambda *_: None)
    device, loss = torch.device('cpu'), torch.nn.CrossEntropyLoss()

    def take():
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(network, device, loader, None, loss, sgd, 5, settings, writer)

    return take


def our_evaluation(arch: str, name: str, batch_size: int):
    """Returns a function that evaluates once, and the seconds of its first time."""
    module, key = create_model(arch), jax.random.key(0)
    images = images_of(arch, batch_size).astype(np.float32) / 255
    labels = np.arange(batch_size, dtype=np.int32) % 10
    network = logits_fn(module, jax.jit(module.init)(key, images[:1]))
    settings = {'sigma': SIGMA, 'n0': 100, 'n': 1000, 'batch_size': batch_size, 'num_classes': 10}

    def take():
        if name == 'certify':
            return smoothing.certify(network, key, images[:1], **settings)
        return jax.block_until_ready(
            bounds.margins(network, images, labels, eps=0.007, method='symbolic')
        )

    started = time.monotonic()
    take()
    return take, time.monotonic() - started


def their_evaluation(arch: str, name: str, batch_size: int):
    import models
    from symbolic_interval.symbolic_network import sym_interval_analyze
    from utils.model import get_layers
    from utils.smoothing import Smooth

    network = getattr(models, arch)(*get_layers('dense'), 'kaiming_normal', num_classes=10).eval()
    images = torch.tensor(images_of(arch, batch_size).transpose(0, 3, 1, 2).copy()) / 255
    labels = torch.arange(batch_size) % 10

    def take():
        with contextlib.redirect_stdout(io.StringIO()):
            if name == 'certify':
                return Smooth(network, 10, SIGMA).certify(
                    images[0], 100, 1000, 0.001, batch_size, 'cpu'
                )
            with torch.no_grad():
                return sym_interval_analyze(network, 0.007, images, labels, use_cuda=False)

    return take


def pair(arch: str, name: str, batch_size: int, phase: str, sides=('ours', 'theirs')) -> tuple:
    """Returns side -> a function that takes a step, and the seconds of our compilation."""
    steps, compilation = {}, 0.0
    if 'ours' in sides:
        steps['ours'], compilation = (
            our_evaluation(arch, name, batch_size)
            if phase == 'evaluate'
            else ours(arch, name, batch_size, 'pretrain' if phase == 'dense' else phase)
        )
    if 'theirs' in sides:
        dense = phase == 'dense'
        steps['theirs'] = (
            their_evaluation(arch, name, batch_size)
            if phase == 'evaluate'
            else theirs(arch, name, batch_size, 'pretrain' if dense else phase, dense)
        )
    return steps, compilation


def compare(case: tuple, rounds: int) -> None:
    """Prints the line of a case."""
    steps, compilation = pair(*case)
    seconds = {side: [] for side in steps}
    for _ in range(rounds + 1):
        for side, step in steps.items():
            started = time.monotonic()
            step()
            seconds[side].append(time.monotonic() - started)
    cells = {}
    for side, times in seconds.items():
        times = [1e3 * s for s in times[1:]]  # the first is warm-up
        cells[side] = statistics.median(times), min(times), max(times)
    ratio = cells['theirs'][0] / cells['ours'][0]
    texts = [f'{m:.0f} ({a:.0f} to {b:.0f})' for m, a, b in cells.values()][::-1]
    print(
        f'| {describe(case)} | {" | ".join(texts)} | {ratio:.2f} | {compilation:.0f} |', flush=True
    )


def describe(case: tuple) -> str:
    return '{}, {}, batch {}, {}'.format(*case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--hydra_dir', required=True)
    parser.add_argument('--only', default='', help='networks, objectives, phases; comma-separated')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--memory', action='store_true')
    parser.add_argument('--alone', help=argparse.SUPPRESS)  # a side, in the process of --memory
    args = parser.parse_args()
    only = set(filter(None, args.only.split(',')))
    axes = [{case[i] for case in CASES} for i in (0, 1, 3)]
    cases = [
        case for case in CASES if all(not only & axis or {*case} & only & axis for axis in axes)
    ]
    repair(args.hydra_dir)
    if args.alone:
        for case in cases:
            (step,) = pair(*case, sides=(args.alone,))[0].values()
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    if args.memory:
        print('| step | PyTorch GB | ours GB |\n|---|---|---|')
        for case in cases:
            command = [sys.executable, __file__, f'--hydra_dir={args.hydra_dir}']
            command += [f'--only={case[0]},{case[1]},{case[3]}']
            peaks = [
                float(subprocess.check_output([*command, f'--alone={side}']).split()[-1])
                for side in ('theirs', 'ours')
            ]
            print(f'| {describe(case)} | {peaks[0]:.2f} | {peaks[1]:.2f} |', flush=True)
        return
    print('| step | PyTorch ms | ours ms | ratio | compile s |\n|---|---|---|---|---|')
    for case in cases:
        compare(case, args.rounds)


if __name__ == '__main__':
    main()
