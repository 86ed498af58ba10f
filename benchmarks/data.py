"""What the input costs, against the device's work and against workers: python benchmarks/data.py

Images per second of every pipeline, and processor time, since a wall clock on a busy machine says
little; the process's memory over three epochs; and what a batch costs beside a natural train step
of wrn_28_4. The images are random, of the sizes of CIFAR-10 and of
ImageNet, and are made and removed here.
"""

import contextlib
import io
import os
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image
from stepping import training_step

from robustprune_jax.config import default
from robustprune_jax.data import load
from robustprune_jax.data.archives import ARCHIVES, Archive
from robustprune_jax.data.batches import eval_batches, train_batches
from robustprune_jax.data.encoded import random_box
from robustprune_jax.data.prepare import prepare
from robustprune_jax.models import create_model
from robustprune_jax.runtime import sharding

CIFAR = 50_000
JPEGS = 2_000
BATCH = 128


def cpu_seconds() -> float:
    """Of this process; of its children once they have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def resident_mb() -> float:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) / 1024


@contextlib.contextmanager
def measured(name: str, images: int, processes: int = 0):
    """Prints a row for what runs inside."""
    wall, cpu = time.monotonic(), cpu_seconds()
    yield
    wall, cpu = time.monotonic() - wall, cpu_seconds() - cpu
    cpu = '-' if processes else f'{1e6 * cpu / images:.0f}'  # of processes that have not ended yet
    print(f'{name:50}{images / wall:10.0f}{cpu:>14}', flush=True)


def batches_of(name: str, iterator, steps: int, processes: int = 0) -> None:
    next(iterator)
    with measured(name, steps * BATCH, processes):
        for _ in range(steps):
            next(iterator)


def make_jpegs(folder: Path, count: int, size: tuple[int, int]) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (size[1] // 5, size[0] // 5, 3)).astype(np.uint8)
        path = folder / ('val' if i % 20 < 4 else 'train') / f'{i % 4}' / f'{i}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def image_folder(folder: Path):
    dataset = default().dataset
    dataset.update(name='image_folder', dir=str(folder), num_classes=4, validation=0)
    return load(dataset)


def full_decode(path: Path, seed: int) -> np.ndarray:
    """What a crop would cost without the smaller scales of JPEG."""
    image = Image.open(io.BytesIO(path.read_bytes()))
    box = random_box(np.random.default_rng(seed), *image.size)
    return np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box))


def step_cpu_seconds(images: np.ndarray, labels: np.ndarray) -> float:
    """Of a natural train step of wrn_28_4 on one batch."""
    config, module, mesh = default(), create_model('wrn_28_4'), sharding.make_mesh()
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    config.objective, config.dataset.augment = 'natural', 'crop_flip'
    update, first_state = training_step(config, 'pretrain', module, variables, (32, 32, 3), mesh)
    state = first_state(variables, batch_shape=(BATCH, 32, 32, 3))
    state = jax.device_put(state, sharding.replicated(mesh))
    batch = sharding.shard_batch(mesh, {'image': images[:BATCH], 'label': labels[:BATCH]})
    seconds = []
    for _ in range(4):
        started = cpu_seconds()
        state, metrics = update(state, batch, jax.random.key(1))
        jax.block_until_ready((state, metrics))
        seconds.append(cpu_seconds() - started)
    return min(seconds[1:])


def main() -> None:
    flags.FLAGS.mark_as_parsed()  # Grain's workers read flags
    images = np.random.default_rng(0).integers(0, 256, (CIFAR, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(CIFAR) % 10).astype(np.int32)
    print(f'{f"batches of {BATCH}":50}{"images/s":>10}{"cpu us/image":>14}')
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        part = {'image': images[:10_000], 'label': labels[:10_000]}
        ARCHIVES['cifar10'] = lambda path: Archive({'train': part, 'test': part}, {})
        with measured('prepare cifar10', 20_000):
            prepare('cifar10', root, root)
        dataset = default().dataset
        dataset.update(name='cifar10', dir=folder, validation=0)
        with measured('load cifar10 (at the start of a run)', 20_000):
            load(dataset)
        small = make_jpegs(root / 'small', JPEGS, (500, 375))
        large = make_jpegs(root / 'large', 100, (1600, 1200))
        for size, path in (('500x375', small), ('1600x1200', large)):
            files = sorted(path.rglob('*.JPEG'))[:200]
            kilobytes = np.mean([file.stat().st_size for file in files]) / 1e3
            train = image_folder(path).train
            with measured(f'{size} JPEG ({kilobytes:.0f} kB), decoded whole', len(files)):
                for i, file in enumerate(files):
                    full_decode(file, i)
            part = train.images[: len(files)]
            with measured(f'{size} JPEG, as training cuts it', len(part)):
                part.random(np.arange(len(part)), np.arange(len(part)))
        train = image_folder(small).train
        threads = f'500x375 JPEG, training, {os.cpu_count()} threads'
        batches_of(threads, train_batches(*train, batch_size=BATCH, seed=0), 14)
        for workers in (1, 2):
            name = f'500x375 JPEG, training, worker processes: {workers}'
            stream = train_batches(*train, batch_size=BATCH, seed=0, workers=workers)
            batches_of(name, stream, 14, workers)
            stream.close()
        batches_of('500x375 JPEG, evaluation', eval_batches(*train, BATCH), 11)
        mixed = {'pseudo': (images, labels), 'pseudo_count': BATCH // 2}
        stream = train_batches(images, labels, batch_size=BATCH, seed=0, **mixed)
        batches_of('32x32 in memory, half pseudo-labelled', stream, 800)
        stream = train_batches(images, labels, batch_size=BATCH, seed=0)
        cpu = cpu_seconds()
        batches_of('32x32 in memory', stream, 800)
        cpu = (cpu_seconds() - cpu) / 800

        for name, split in (('32x32 in memory', (images, labels)), ('500x375 JPEG', train)):
            stream = train_batches(*split, batch_size=BATCH, seed=0)
            memory = []
            for _ in range(4):
                memory.append(f'{resident_mb():.0f}')
                for _ in range(len(split[1]) // BATCH):
                    next(stream)
            print(f'{name}: MB resident before and after three epochs: {", ".join(memory)}')

    step = step_cpu_seconds(images, labels)
    print(
        f'processor seconds of a natural step of wrn_28_4: {step:.2f}; of its 32x32 batch: '
        f'{cpu:.4f}, {100 * cpu / step:.2f} %'
    )


if __name__ == '__main__':
    main()
