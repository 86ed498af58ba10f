"""Memory of one device in training, by model and batch, from XLA's plan: nothing is allocated.

python benchmarks/memory.py --config=configs/cifar10.py --batch_sizes=64,128 [--phase=prune]

Prints GB for the state (weights, scores, optimizer, carry), for what a step needs beside it, and
the FLOPs of a step, where XLA counts a loop once: the parts of config.accumulate, and on GPU and
TPU the updates of `free`. The batch sizes are of one device. The plan is that of the backend it
runs on: a CPU's is a guide to another's, no more.
"""

from functools import partial

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.masks import init_scores, topk_masks
from robustprune_jax.models import create_model
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.optim import optimizer, phase_labels
from robustprune_jax.sharding import make_mesh
from robustprune_jax.step import create_state, train_step

CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment', lock_config=True)
PHASE = flags.DEFINE_enum('phase', 'pretrain', ['pretrain', 'prune', 'finetune'], 'Phase')
BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['128'], 'Images of one device')
IMAGE = flags.DEFINE_list('image', ['32', '32', '3'], 'Height, width, channels')


def main(argv: list[str]) -> None:
    config, phase = CONFIG.value, PHASE.value
    module = create_model(config.arch, config.dataset.num_classes)
    objective = OBJECTIVES[config[phase].objective or config.objective](config)
    shape = tuple(map(int, IMAGE.value))
    density = config.densities[0]

    def variables():
        found = module.init(jax.random.key(0), np.zeros((1, *shape), np.float32))
        if phase != 'pretrain':
            found['scores'] = init_scores(found['params'])
        if phase == 'finetune':
            found['masks'] = topk_masks(found['scores'], density)
        return found

    shapes = jax.eval_shape(variables)
    labels = phase_labels(shapes, phase)
    tx = optimizer(config[phase], labels, 1)
    step = train_step(
        module,
        objective,
        tx,
        AUGMENTATIONS['none'],
        make_mesh(jax.devices()[:1]),
        steps_per_epoch=1,
        total_steps=1,
        density=density if phase == 'prune' else None,
        accumulate=config.accumulate,
        compute_dtype=config.compute_dtype,
    )
    parts = f' in {config.accumulate} parts' if config.accumulate > 1 else ''
    print(f'{config.arch}, {phase}, {config.compute_dtype}{parts}, on {jax.default_backend()}')
    print(f'{"images":>8}{"state GB":>10}{"step GB":>10}{"TFLOP":>10}')
    for batch_size in map(int, BATCH_SIZES.value):
        batch = {
            'image': jax.ShapeDtypeStruct((batch_size, *shape), np.uint8),
            'label': jax.ShapeDtypeStruct((batch_size,), np.int32),
        }
        new_state = partial(
            create_state, tx=tx, objective=objective, batch_shape=(batch_size, *shape)
        )
        state = jax.eval_shape(new_state, shapes)
        compiled = step.lower(state, batch, jax.random.key(0)).compile()
        memory = compiled.memory_analysis()
        flops = compiled.cost_analysis()['flops']
        print(
            f'{batch_size:8}{memory.argument_size_in_bytes / 1e9:10.3f}'
            f'{memory.temp_size_in_bytes / 1e9:10.3f}{flops / 1e12:10.3f}',
            flush=True,
        )


if __name__ == '__main__':
    app.run(main)
