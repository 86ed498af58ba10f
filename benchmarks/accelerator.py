"""What one GPU or TPU makes of this: JSON to FILE after every number, so that a cut run keeps them.

python benchmarks/accelerator.py --out=FILE [--quick] [--parts=ceilings,steps,small,bounds,smooth]

ceilings: TFLOP/s of a bfloat16 matrix product and GB/s of a copy. steps: TRADES-10 of wrn_28_4
and resnet18, three phases, float32 and bfloat16, batch 128 and 512: milliseconds of steps waited
for and of steps that follow each other, TFLOP/s and the share of the ceiling, seconds to compile,
the most GB so far. small: mnist_model, what dispatch costs: steps one by one, and 16 in one call.
bounds: images a second under CROWN-IBP and CROWN; smooth: noisy images a second. --quick: wrn_28_4
alone, batch 128, bfloat16. --archs, --batch_sizes, --attack_steps and --size make it small enough
to try it on a CPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from stepping import training_step

from conversion.size import costs
from conversion.trace import trace
from robustprune_jax.bounds import margins
from robustprune_jax.config import default
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import init_scores, topk_masks
from robustprune_jax.runtime import compiler, sharding
from robustprune_jax.smoothing import certify
from robustprune_jax.training.state import place

DENSITY = 0.1


def milliseconds(step: Callable, repeats: int) -> dict[str, float]:
    """Of steps that are each waited for (median), and of steps that follow each other."""
    for _ in range(3):
        jax.block_until_ready(step())
    alone = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(step())
        alone.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(repeats):
        last = step()
    jax.block_until_ready(last)
    following = (time.perf_counter() - started) / repeats
    return {'ms': 1e3 * statistics.median(alone), 'pipelined_ms': 1e3 * following}


def ceilings(given, note):
    n = given.size
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1))
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    x = jnp.ones((n, n, 4), jnp.float32)
    of_product = milliseconds(lambda: multiply(a, b), given.repeats)['pipelined_ms']
    of_copy = milliseconds(lambda: add(x), given.repeats)['pipelined_ms']
    note('ceilings', tflops=2 * n**3 / of_product / 1e9, gb_per_s=2 * x.nbytes / of_copy / 1e6)


def prepared(arch, phase, dtype, batch_size, attack_steps, objective='trades', shape=(32, 32, 3)):
    """A step, its state and batch, and the multiply-adds of an image."""
    config = default()
    config.objective, config.compute_dtype = objective, dtype
    config.densities = (DENSITY,)
    config.attack.update(eps=0.031, step_size=0.0078, steps=attack_steps)
    module, mesh = create_model(arch), sharding.make_mesh(jax.devices()[:1])
    variables = dict(jax.jit(module.init)(jax.random.key(0), np.zeros((1, *shape), np.float32)))
    graph = trace(module, variables, shape)
    if phase != 'pretrain':
        variables['scores'] = init_scores(variables['params'])
    if phase == 'finetune':
        variables['masks'] = topk_masks(variables['scores'], DENSITY)
    update, state_of = training_step(config, phase, module, variables, shape, mesh)
    state = place(state_of(variables, batch_shape=(batch_size, *shape)), mesh)
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.integers(0, 256, (batch_size, *shape), dtype=np.uint8),
        'label': rng.integers(0, 10, batch_size).astype(np.int32),
    }
    batch = sharding.put(batch, sharding.sharded(mesh))
    return update, state, batch, costs(graph, graph)['macs']


def steps(given, note):
    ceiling = given.results.get('ceilings', {}).get('tflops')
    phases = ('pretrain', 'prune', 'finetune')
    for arch, size, dtype, phase in product(given.archs, given.batch_sizes, given.dtypes, phases):
        update, state, batch, macs = prepared(arch, phase, dtype, size, given.attack_steps)
        key, started = jax.random.key(1), time.perf_counter()
        update = update.lower(state, batch, key).compile()
        seconds = time.perf_counter() - started

        def step(update=update, batch=batch, key=key):
            nonlocal state
            state, metrics = update(state, batch, key)
            return metrics

        found = milliseconds(step, given.repeats)
        # An attack's step is a pass forward and one back to the image; then the clean logits that
        # it leaves from, and both images forward, back, and back to the weights.
        tflop = (2 * given.attack_steps + 1 + 6) * 2 * macs * size / 1e12
        rate = tflop / found['pipelined_ms'] * 1e3
        peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0) / 1e9
        note(
            f'{arch} {phase} {dtype} {size}',
            **found,
            tflops=rate,
            of_ceiling=rate / ceiling if ceiling else None,
            compile_s=seconds,
            peak_gb_so_far=peak,
        )


def small(given, note):
    shape = (28, 28, 1)
    for objective in ('natural', 'trades'):
        settings = 'float32', 128, given.attack_steps, objective, shape
        # A CPU's compiler options are for the outermost jit only, which a step in a scan is not.
        with compiler.platform('gpu' if compiler.backend() == 'cpu' else compiler.backend()):
            one, state, batch, _ = prepared('mnist_model', 'pretrain', *settings)
        key = jax.random.key(1)

        @partial(jax.jit, donate_argnums=0)
        def sixteen(state, one=one, batch=batch, key=key):
            return jax.lax.scan(lambda state, _: one(state, batch, key), state, length=16)

        def alone(one=one, batch=batch, key=key):
            nonlocal state
            state, metrics = one(state, batch, key)
            return metrics

        def together(sixteen=sixteen):
            nonlocal state
            state, metrics = sixteen(state)
            return metrics

        note(
            f'mnist_model {objective}',
            ms_one_by_one=milliseconds(alone, given.repeats)['pipelined_ms'],
            ms_in_16=milliseconds(together, given.repeats)['pipelined_ms'] / 16,
        )


def network():
    """mnist_model as it is drawn, and images."""
    module = create_model('mnist_model')
    images = jax.random.uniform(jax.random.key(1), (64, 28, 28, 1))
    return logits_fn(module, dict(module.init(jax.random.key(0), images))), images


def bounds(given, note):
    logits, images = network()
    labels = jnp.argmax(logits(images), -1)
    for method in ('crown_ibp', 'crown'):

        def bounded(method=method):
            return margins(logits, images, labels, eps=0.02, method=method)

        found = milliseconds(bounded, 3)
        note(f'bounds {method}', images_per_s=1e3 * len(images) / found['pipelined_ms'])


def smooth(given, note):
    logits, images = network()
    settings = {'sigma': 0.25, 'n0': 100, 'n': 1_000, 'batch_size': 1_000, 'num_classes': 10}
    seconds = []
    for _ in range(2):  # the first one compiles
        started = time.perf_counter()
        certify(logits, jax.random.key(0), images, **settings)
        seconds.append(time.perf_counter() - started)
    note('smooth', noisy_images_per_s=1_100 * len(images) / seconds[-1])


PARTS = {'ceilings': ceilings, 'steps': steps, 'small': small, 'bounds': bounds, 'smooth': smooth}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='One accelerator, measured.')
    add = parser.add_argument

    def listed(kind):
        return lambda text: [kind(x) for x in text.split(',')]

    add('--out', type=Path, required=True, help='a JSON file, which later parts add to')
    add('--parts', type=listed(str), default=list(PARTS), help=','.join(PARTS))
    add('--quick', action='store_true', help='wrn_28_4, batch 128, bfloat16')
    add('--archs', type=listed(str), default=['wrn_28_4', 'resnet18'])
    add('--batch_sizes', type=listed(int), default=[128, 512])
    add('--dtypes', type=listed(str), default=['bfloat16', 'float32'])
    add('--attack_steps', type=int, default=10)
    add('--size', type=int, default=8192, help="of the ceilings' matrices")
    add('--repeats', type=int, default=20)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f'no part {", ".join(sorted(unknown))}: there is {", ".join(PARTS)}')
    if given.quick:
        given.archs, given.batch_sizes, given.dtypes = ['wrn_28_4'], [128], ['bfloat16']
    return given


def main() -> None:
    given, started = flags(), time.monotonic()
    given.results = json.loads(given.out.read_text()) if given.out.exists() else {}

    def note(name, **values):
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        given.results[name] = {**rounded, 'at_s': round(time.monotonic() - started)}
        print(name, given.results[name], flush=True)
        given.out.write_text(json.dumps(given.results, indent=1) + '\n')

    device = jax.devices()[0]
    note('device', kind=device.device_kind, platform=device.platform, jax=jax.__version__)
    for part in given.parts:
        PARTS[part](given, note)


if __name__ == '__main__':
    main()
