"""Certification against bare forward passes, as ratios in one run: python benchmarks/smoothing.py

certify's noisy forward passes per second, against the forward pass alone and against the forward
pass with the drawing of its noise. Interleaved; medians.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.smoothing import certify

SIGMA = 0.25


@jax.jit
def forward(network, images):
    return jnp.argmax(network(images), axis=-1)


@jax.jit
def sample_and_forward(network, key, image, row):
    """The same keys as certify: one for each noisy copy."""
    rows = row + jnp.arange(len(image))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(rows)
    noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(keys)
    return jnp.argmax(network(image + SIGMA * noise), axis=-1)


def main() -> None:
    print(f'{"network":32}{"certify/s":>10}{"of forward":>12}{"of forward + noise":>20}')
    for arch, shape, batch_size, batches in (
        ('mnist_model', (28, 28, 1), 1000, 20),
        ('wrn_28_4', (32, 32, 3), 32, 4),
    ):
        module = create_model(arch)
        variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *shape)))
        network, key = logits_fn(module, variables), jax.random.key(1)
        image = np.random.default_rng(0).random((1, *shape), np.float32)
        batch = jnp.tile(image, (batch_size, 1, 1, 1))
        samples = batch_size * batches

        def run_forward(network=network, batch=batch, batches=batches):
            return [forward(network, batch) for _ in range(batches)]

        def run_sampled(network=network, batch=batch, batches=batches, key=key):
            rows = range(0, batches * len(batch), len(batch))
            return [sample_and_forward(network, key, batch, row) for row in rows]

        def run_certify(network=network, image=image, size=batch_size, n=samples, key=key):
            return certify(
                network, key, image, sigma=SIGMA, n0=size, n=n - size, batch_size=size,
                num_classes=10,
            )  # fmt: skip

        runs = {'forward': run_forward, 'sampled': run_sampled, 'certify': run_certify}
        seconds = {name: [] for name in runs}
        for _ in range(6):
            for name, run in runs.items():
                started = time.monotonic()
                jax.block_until_ready(run())
                seconds[name].append(time.monotonic() - started)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        print(
            f'{f"{arch}, batch {batch_size}":32}{samples / median["certify"]:10.0f}'
            f'{median["forward"] / median["certify"]:12.2f}'
            f'{median["sampled"] / median["certify"]:20.2f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
