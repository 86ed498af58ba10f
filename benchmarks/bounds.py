"""What bounds cost, as ratios in one run: python benchmarks/bounds.py [steps | verify | mixtrain]

steps: a training step of ibp and crown_ibp against a natural one. verify: symbolic bounds of 100
images at once against one image after the other, and full CROWN's memory. mixtrain: one step on
cifar_model_large. Timings are interleaved; the median and the least are printed.
"""

import resource
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from stepping import training_step

from robustprune_jax.bounds import margins
from robustprune_jax.config import default
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.runtime import sharding

EPS = 0.007


def network(arch: str) -> tuple:
    """Returns a module and initial variables."""
    size, channels = (28, 1) if arch.startswith('mnist') else (32, 3)
    module = create_model(arch)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, size, size, channels)))


def images(arch: str, count: int) -> np.ndarray:
    shape = (count, 28, 28, 1) if arch.startswith('mnist') else (count, 32, 32, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def compiled_step(arch: str, batch_size: int, objective: str, **settings):
    """Returns a function that takes one training step, half way up the ramp of eps."""
    config = default()
    config.certified.eps = EPS
    config.objective, config.pretrain.ramp_epochs = objective, 10.0
    if settings:
        config[objective].update(settings)
    module, variables = network(arch)
    batch = {'image': images(arch, batch_size), 'label': np.arange(batch_size) % 10}
    mesh, image_shape = sharding.make_mesh(), batch['image'].shape[1:]
    update, first_state = training_step(config, 'pretrain', module, variables, image_shape, mesh)
    state = first_state(variables, batch_shape=batch['image'].shape)
    state = state.replace(step=jnp.full((), 500, jnp.int32))
    started = time.monotonic()
    update = update.lower(state, batch, jax.random.key(1)).compile()
    seconds = time.monotonic() - started

    def take():
        nonlocal state
        state, metrics = update(state, batch, jax.random.key(1))
        return metrics

    return take, seconds


def timed(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Returns seconds of each function, in turns; the first turn is not counted."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.monotonic()
            jax.block_until_ready(function())
            seconds[name].append(time.monotonic() - started)
    return {name: times[1:] for name, times in seconds.items()}


def steps() -> None:
    print(
        f'{"network":24}{"step":22}{"median ms":>10}{"least":>8}{"ratio":>7}  to{"compile s":>14}'
    )
    for arch, batch_size in (('mnist_model', 128), ('cifar_model', 64), ('cifar_model_large', 16)):
        cases = {
            'natural': ('natural', {}),
            'ibp': ('ibp', {}),
            'crown_ibp fused': ('crown_ibp', {'loss_fusion': True}),
            'crown_ibp by class': ('crown_ibp', {'loss_fusion': False}),
        }
        made = {k: compiled_step(arch, batch_size, o, **s) for k, (o, s) in cases.items()}
        seconds = timed({name: take for name, (take, _) in made.items()}, 7)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            to = 'natural' if name in ('natural', 'ibp') else 'ibp'
            print(
                f'{f"{arch}, batch {batch_size}":29}{name:19}{1e3 * median:10.1f}'
                f'{1e3 * min(seconds[name]):8.1f}{median / medians[to]:7.2f}  {to:8}'
                f'{made[name][1]:8.1f}',
                flush=True,
            )


def verify() -> None:
    module, variables = network('cifar_model')
    net = logits_fn(module, variables)
    x, y = images('cifar_model', 100) / np.float32(255), np.arange(100) % 10
    bounds = partial(margins, net, eps=EPS, method='symbolic')

    def one_by_one():
        return [bounds(x[i : i + 1], y[i : i + 1]) for i in range(100)]

    seconds = timed({'at once': lambda: bounds(x, y), 'one by one': one_by_one}, 3)
    for name, times in seconds.items():
        print(f'symbolic, cifar_model, 100 images {name}: {statistics.median(times):.2f} s')
    started = time.monotonic()
    jax.block_until_ready(margins(net, x, y, eps=EPS, method='crown', memory_gb=4))
    print(f'crown, cifar_model, 100 images: {time.monotonic() - started:.1f} s with compilation')
    print(f'peak memory of this process: {_peak_gb():.2f} GB')


def mixtrain() -> None:
    take, seconds = compiled_step('cifar_model_large', 50, 'mixtrain', images=1, probability=1.0)
    started = time.monotonic()
    jax.block_until_ready(take())
    print(
        f'mixtrain, cifar_model_large, batch 50, 1 image: {time.monotonic() - started:.1f} s, '
        f'compiled in {seconds:.1f} s, peak memory of this process {_peak_gb():.2f} GB'
    )


def _peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


PARTS = {'steps': steps, 'verify': verify, 'mixtrain': mixtrain}

if __name__ == '__main__':
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
