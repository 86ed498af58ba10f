"""What a step of the prune phase takes under each allocation and structure, beside uniform's.

python benchmarks/allocation.py --config=configs/evidence.py:trades --image=28,28,1
python benchmarks/allocation.py --config=configs/cifar10.py --config.arch=wrn_28_4 --batch_size=8

Steps take turns, so that what else the machine does reaches all; printed are medians of --rounds,
and of the ratios to uniform's step just before.
"""

import statistics
import time
from collections import defaultdict

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from stepping import training_step

from robustprune_jax.models import create_model
from robustprune_jax.pruning import ALLOCATIONS, init_scores
from robustprune_jax.runtime.sharding import make_mesh

CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment', lock_config=True)
BATCH_SIZE = flags.DEFINE_integer('batch_size', 128, 'Images of a step')
ROUNDS = flags.DEFINE_integer('rounds', 15, 'Steps of each')
IMAGE = flags.DEFINE_list('image', ['32', '32', '3'], 'Height, width, channels')


def stepper(config, axes, module, variables, batch):
    """Returns a function that takes a step and returns its seconds."""
    config = config.copy_and_resolve_references()
    config.pruning.update(axes)
    shape = batch['image'].shape
    update, first_state = training_step(config, 'prune', module, variables, shape[1:], make_mesh())
    state = first_state(variables, batch_shape=shape)

    def take():
        nonlocal state
        started = time.monotonic()
        state, metrics = update(state, batch, jax.random.key(0))
        jax.block_until_ready(metrics)
        return time.monotonic() - started

    take()
    return take


def main(argv: list[str]) -> None:
    config = CONFIG.value
    module = create_model(config.arch, config.dataset.num_classes)
    images = np.zeros((BATCH_SIZE.value, *map(int, IMAGE.value)), np.uint8)
    batch = {'image': images, 'label': np.arange(len(images), dtype=np.int32) % 10}
    variables = dict(jax.jit(module.init)(jax.random.key(0), images[:1].astype(np.float32)))
    variables['scores'] = init_scores(variables['params'])
    kinds = {name: {'allocation': name} for name in ALLOCATIONS}
    kinds['channels'] = {'allocation': 'global', 'structure': 'channels'}
    steppers = {
        name: stepper(config, axes, module, variables, batch) for name, axes in kinds.items()
    }
    seconds = defaultdict(list)
    for _ in range(ROUNDS.value):
        for name, take in steppers.items():
            seconds[name].append(take())
    print(f'{config.arch}, batch {len(images)}, density {config.densities[0]:g}')
    for name, times in seconds.items():
        ratios = [one / usual for one, usual in zip(times, seconds['uniform'], strict=True)]
        ratio, spread = statistics.median(ratios), statistics.quantiles(ratios, n=4)
        print(
            f'{name:10}{1e3 * statistics.median(times):9.1f} ms{ratio:8.3f} '
            f'({spread[0]:.3f} to {spread[2]:.3f})'
        )


if __name__ == '__main__':
    app.run(main)
