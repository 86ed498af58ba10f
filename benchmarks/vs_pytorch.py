r"""Training steps beside the original's, as ratios in one run.

git clone https://github.com/inspire-group/hydra  # the caller's own copy: nothing of it is here
python benchmarks/vs_pytorch.py --hydra_dir=hydra [--only=mnist_model,trades]

A step is the original's own trainer on a loader of one batch, and our compiled step on the same
images, in turns, with the same threads. Medians, (least to most), PyTorch's time over ours, our
compilation. `dense` is the original's trainer on plain layers in channels_last, its best case. The
original needs repairs on current torch; they are made here, at run time.
"""

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
import types
from unittest.mock import MagicMock

import jax
import numpy as np
import torch

from robustprune_jax import sharding
from robustprune_jax.config import default
from robustprune_jax.masks import init_scores
from robustprune_jax.models import create_model
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.optim import optimizer, phase_labels
from robustprune_jax.step import create_state, train_step

# our objective -> the original's trainer
TRAINERS = {'natural': 'base', 'trades': 'adv', 'smooth': 'smooth', 'crown_ibp': 'crown-ibp'}
CASES = [  # network, objective, batch
    *(('mnist_model', objective, 128) for objective in ('natural', 'trades', 'smooth')),
    ('cifar_model', 'crown_ibp', 64),
    *((arch, objective, 32) for arch in ('vgg16_bn', 'wrn_28_4')
      for objective in ('natural', 'smooth', 'trades')),
]  # fmt: skip
PHASES = ('pretrain', 'prune', 'finetune')
EPS, STEP_SIZE, STEPS, BETA, SIGMA, DENSITY = 0.031, 0.0078, 10, 6.0, 0.25, 0.01


def images_of(arch: str, batch_size: int) -> np.ndarray:
    shape = (28, 28, 1) if arch == 'mnist_model' else (32, 32, 3)
    return np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8)


def ours(arch: str, objective: str, batch_size: int, phase: str):
    """Returns a function that takes a step, and the seconds of its compilation."""
    config = default()
    config.attack.update(eps=EPS, step_size=STEP_SIZE, steps=STEPS)
    config.certified.eps = 0.007
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
    trained = OBJECTIVES[objective](config)
    tx = optimizer(config[phase], phase_labels(variables, phase), 100)
    batch = {'image': images, 'label': np.arange(batch_size, dtype=np.int32) % 10}
    state = create_state(variables, tx, trained, images.shape)
    started = time.monotonic()
    update = train_step(
        module,
        trained,
        tx,
        lambda key, x: x,
        sharding.make_mesh(),
        steps_per_epoch=100,
        total_steps=2000,
        ramp_epochs=10.0 if objective == 'crown_ibp' else 0.0,
        density=DENSITY if phase == 'prune' else None,
    )
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
    import utils.eval

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
        schedule_length=20,
    )  # fmt: skip
    trainer = importlib.import_module(f'trainer.{TRAINERS[objective]}')
    layers = get_layers('dense' if dense else 'subnet')
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--hydra_dir', required=True)
    parser.add_argument('--only', default='', help='networks, objectives, phases; comma-separated')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    only = set(filter(None, args.only.split(',')))
    repair(args.hydra_dir)
    print('| step | PyTorch ms | ours ms | ratio | compile s |\n|---|---|---|---|---|')
    for arch, objective, batch_size in CASES:
        for phase in (*PHASES, 'dense'):
            names = {arch, objective, phase}
            axes = ({a for a, _, _ in CASES}, {o for _, o, _ in CASES}, {*PHASES, 'dense'})
            if any(only & axis and not only & axis & names for axis in axes):
                continue
            dense = phase == 'dense'
            case = (arch, objective, batch_size, 'pretrain' if dense else phase)
            step, compilation = ours(*case)
            functions = {'ours': step, 'theirs': theirs(*case, dense)}
            seconds = {name: [] for name in functions}
            for _ in range(args.rounds + 1):
                for name, function in functions.items():
                    started = time.monotonic()
                    function()
                    seconds[name].append(time.monotonic() - started)
            cells = {}
            for name, times in seconds.items():
                times = [1e3 * s for s in times[1:]]  # the first is warm-up
                cells[name] = statistics.median(times), min(times), max(times)
            ratio = cells['theirs'][0] / cells['ours'][0]
            texts = [f'{m:.0f} ({a:.0f} to {b:.0f})' for m, a, b in cells.values()][::-1]
            print(
                f'| {arch}, {objective}, batch {batch_size}, {phase} | {" | ".join(texts)} | '
                f'{ratio:.2f} | {compilation:.0f} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
