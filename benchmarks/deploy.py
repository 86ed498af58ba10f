"""A pruned network dense in onnxruntime, compacted in onnxruntime, and as C.

taskset -c 1 python benchmarks/deploy.py --arch=wrn_28_4 --densities=0.1,0.05,0.01
python benchmarks/deploy.py --arch=wrn_28_4 --threads=2 --batch=64
python benchmarks/deploy.py --network=fashion_trades_0.01 --image=28,28,1

Architectures have random weights, and masks of the same fraction of every layer at random. Each
round times all, one after the other; printed are medians in ms and how many times as fast as
onnxruntime's dense network they are.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from conversion.compiled import compiled
from conversion.passes import compact, fold
from conversion.size import costs
from conversion.to_c import is_large, write_c
from conversion.to_onnx import write_onnx
from conversion.trace import trace
from robustprune_jax import zoo
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import init_scores, topk_masks

ROUNDS = 15


def random_network(arch, density, image_shape):
    """Variables as training leaves them, with a mask at random."""
    module = create_model(arch)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1]) / density)
        return rng.normal(0, spread, leaf.shape).astype(np.float32)

    variables = jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), images))
    scores = init_scores(variables['params'], 'kaiming_normal', jax.random.key(0))
    variables['masks'] = topk_masks(scores, density)
    return module, variables, image_shape


def session(graph, path, threads):
    write_onnx(graph, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    found = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: found.run(['logits'], {'images': images})[0]


def in_threads(run, pool, threads):
    """Each thread takes its part of the batch."""
    if threads == 1:
        return run
    return lambda images: np.concatenate(list(pool.map(run, np.array_split(images, threads))))


def compare(label, module, variables, image_shape, batch, threads):
    dense = fold(trace(module, variables, image_shape))
    smaller = compact(dense)
    images = np.random.default_rng(0).random((batch, *image_shape), np.float32)
    expected = np.asarray(logits_fn(module, variables)(images))
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    pool = ThreadPoolExecutor(threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            'dense': session(dense, Path(folder) / 'dense.onnx', threads),
            'compact': session(smaller, Path(folder) / 'compact.onnx', threads),
            'C': in_threads(compiled(smaller), pool, threads),
        }
        sizes = [os.path.getsize(Path(folder) / f'{name}.onnx') for name in ('dense', 'compact')]
        constants = f'{folder}/net.bin' if is_large(smaller) else None
        sizes.append(write_c(smaller, f'{folder}/net.c', constants=constants))
    times = {name: [] for name in runs}
    for name, run in runs.items():
        error = np.abs(run(images) - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f'{label}: {name} is off by {error:.1e}'
    for _ in range(ROUNDS if batch == 1 else 5):
        for name, run in runs.items():
            best = float('inf')
            for _ in range(5 if batch == 1 else 1):
                started = time.perf_counter()
                run(images)
                best = min(best, time.perf_counter() - started)
            times[name].append(1e3 * best)
    middle = {name: statistics.median(found) for name, found in times.items()}
    row = ''.join(
        f'{size / 1e6:9.3f}{milliseconds:10.3f}{middle["dense"] / milliseconds:7.1f}'
        for size, milliseconds in zip(sizes, middle.values(), strict=True)
    )
    macs = costs(dense, smaller)['sparse_macs']
    print(f'{label:22}{macs / 1e6:9.2f}{row}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', default='mnist_model')
    parser.add_argument('--image', default='32,32,3', help='H,W,C')
    parser.add_argument('--densities', default='0.1,0.05,0.01')
    parser.add_argument('--network', help='the folder of a phase, or a name of the zoo')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    heads = ''.join(
        f'{f"{name} MB":>9}{"ms":>10}{"times":>7}' for name in ('dense', 'compact', 'C')
    )
    print(f'{"":22}{"M mult.":>9}{heads}')
    shape = tuple(map(int, args.image.split(',')))
    if args.network:
        compare(Path(args.network).name, *zoo.load(args.network), shape, args.batch, args.threads)
        return
    for density in map(float, args.densities.split(',')):
        network = random_network(args.arch, density, shape)
        compare(f'{args.arch} {density:g}', *network, args.batch, args.threads)


if __name__ == '__main__':
    main()
