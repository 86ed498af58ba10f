"""What a compiled training step needs, from XLA's plan, and what it takes here.

python benchmarks/program.py --config=configs/cifar10.py --batch_sizes=64,128 [--phase=prune]
XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/program.py --devices=1,8 ...

For each number of devices and each batch, of one device: GB of the state (weights, scores,
optimizer, carry) and of what a step needs beside it; TFLOP, and GB that its operations read and
write; the least milliseconds that an H100 and a TPU v5e could take for those, in bfloat16; with
--steps=N the median milliseconds of N steps here, else nothing is allocated or run; what the
devices exchange. XLA counts a loop once: the parts of config.accumulate, and on GPU and TPU the
attack's steps and the updates of `free`. The plan is that of the backend it runs on: a CPU's, which
fuses less, is a guide to another's, no more.

Ends with an error where a program holds float64, transfers to the host, or gathers arrays.
"""

import re
import statistics
import sys
import time
from collections import Counter
from functools import partial

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from stepping import training_step

from robustprune_jax.models import create_model
from robustprune_jax.pruning import init_scores, topk_masks
from robustprune_jax.runtime.sharding import make_mesh, put, replicated, sharded
from robustprune_jax.training.state import place

CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment', lock_config=True)
PHASE = flags.DEFINE_enum('phase', 'pretrain', ['pretrain', 'prune', 'finetune'], 'Phase')
BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['128'], 'Images of one device')
STEPS = flags.DEFINE_integer('steps', 0, 'Steps to take and time')
DEVICES = flags.DEFINE_list('devices', ['1'], 'Numbers of devices')
IMAGE = flags.DEFINE_list('image', ['32', '32', '3'], 'Height, width, channels')

# Peak FLOP/s in bfloat16 without sparsity, and bytes/s of memory, as the vendors print them.
ROOFS = {'H100 ms': (989e12, 3.35e12), 'v5e ms': (197e12, 0.82e12)}
COLLECTIVES = r'all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|'
COLLECTIVES += 'all-reduce'


def exchanged(program: str) -> Counter:
    """How many arrays each kind of collective moves."""
    found = Counter()
    for shapes, kind in re.findall(rf'= (\(?[^()]*\)?) ({COLLECTIVES})(?:-start)?\(', program):
        found[kind] += len(re.findall(r'\[', shapes))
    return found


def faults(program: str, kinds: Counter) -> list[str]:
    found = {
        'float64': 'f64[' in program,
        'transfers to the host': re.search(r'\b(infeed|outfeed|send|recv)\(|callback', program),
        'gathers arrays': kinds['all-gather'],
    }
    return [fault for fault, is_there in found.items() if is_there]


def placed(shapes, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def milliseconds(compiled, state, batch) -> float:
    times = []
    for _ in range(STEPS.value + 1):
        started = time.monotonic()
        state, metrics = compiled(state, batch, jax.random.key(0))
        jax.block_until_ready(metrics)
        times.append(1e3 * (time.monotonic() - started))
    return statistics.median(times[1:])  # the first is warm-up


def main(argv: list[str]) -> None:
    config, phase = CONFIG.value, PHASE.value
    config.dataset.augment = 'none'
    module = create_model(config.arch, config.dataset.num_classes)
    shape = tuple(map(int, IMAGE.value))

    def variables():
        found = module.init(jax.random.key(0), np.zeros((1, *shape), np.float32))
        if phase != 'pretrain':
            found['scores'] = init_scores(found['params'])
        if phase == 'finetune':
            found['masks'] = topk_masks(found['scores'], config.densities[0])
        return found

    shapes = jax.eval_shape(variables)
    parts = f' in {config.accumulate} parts' if config.accumulate > 1 else ''
    print(f'{config.arch}, {phase}, {config.compute_dtype}{parts}, on {jax.default_backend()}')
    heads = ('devices', 'images', 'state GB', 'step GB', 'TFLOP', 'moved GB', *ROOFS)
    heads += ('here ms',) if STEPS.value else ()
    print(''.join(f'{head:>9}' for head in heads) + '  exchanged')
    wrong = []
    for devices in map(int, DEVICES.value):
        mesh = make_mesh(jax.devices()[:devices])
        step, first_state = training_step(config, phase, module, shapes, shape, mesh)
        for batch_size in map(int, BATCH_SIZES.value):
            images = (batch_size * devices, *shape)
            batch = {
                'image': jax.ShapeDtypeStruct(images, np.uint8),
                'label': jax.ShapeDtypeStruct(images[:1], np.int32),
            }
            new_state = partial(first_state, batch_shape=images)
            state = jax.eval_shape(new_state, shapes)
            carry = placed(state.carry, sharded(mesh))
            state = placed(state.replace(carry=()), replicated(mesh)).replace(carry=carry)
            batch = placed(batch, sharded(mesh))
            compiled = step.lower(state, batch, jax.random.key(0)).compile()
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            flops, moved = cost['flops'], cost['bytes accessed']
            numbers = [
                f'{memory.argument_size_in_bytes / 1e9:9.3f}',
                f'{memory.temp_size_in_bytes / 1e9:9.3f}',
                f'{flops / 1e12:9.3f}',
                f'{moved / 1e9:9.1f}',
                *(
                    f'{1e3 * max(flops / peak, moved / width):9.2f}'
                    for peak, width in ROOFS.values()
                ),
            ]
            if STEPS.value:
                real = place(new_state(jax.jit(variables)()), mesh)
                grey = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), batch)
                here = milliseconds(compiled, real, put(grey, sharded(mesh)))
                numbers.append(f'{here:9.0f}')
            program = compiled.as_text()
            kinds = exchanged(program)
            text = ', '.join(f'{kind} of {count}' for kind, count in kinds.items()) or 'nothing'
            print(f'{devices:9}{batch_size:9}{"".join(numbers)}  {text}', flush=True)
            wrong += [f'{devices} devices: {fault}' for fault in faults(program, kinds)]
    if wrong:
        sys.exit('; '.join(wrong))


if __name__ == '__main__':
    app.run(main)
