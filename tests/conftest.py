from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from robustprune_jax import pipeline
from robustprune_jax.config import TRAINED, default

# Compiled programs are most of the tests' time, and are the same every run.
jax.config.update(
    'jax_compilation_cache_dir', str(Path.home() / '.cache' / 'robustprune_jax' / 'xla')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
flags.FLAGS.mark_as_parsed()  # Grain's threads read flags


@pytest.fixture(scope='session')
def tiny_npz(tmp_path_factory):
    """12x12 images of 3 classes that a small network tells apart: a bright band, and noise."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (('train', 112), ('test', 40)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 12, 12, 1))
        for image, label in zip(images, labels, strict=True):
            image[4 * label : 4 * label + 4] += 130
        arrays |= {f'{part}_images': images.astype(np.uint8), f'{part}_labels': labels}
    path = tmp_path_factory.mktemp('data') / 'tiny.npz'
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope='session')
def tiny_config(tiny_npz):
    """Returns a function that makes a new config of all phases, seconds long."""

    def make():
        config = default()
        config.dataset.update(name='npz', dir=str(tiny_npz), num_classes=3, validation=16)
        config.densities = (0.5, 0.1)
        config.trades.beta = 1.0
        config.attack.update(steps=2, eps=0.05)
        config.evaluate.update(batch_size=16)
        config.evaluate.pgd.update(steps=3, eps=0.05)
        for phase in TRAINED:
            config[phase].update(epochs=4, batch_size=32, learning_rate=0.1)
        config.pretrain.epochs = 8
        return config

    return make


@pytest.fixture(scope='session')
def finished(tiny_config, tmp_path_factory):
    """The workdir of a whole run, and what it returned. Not to be changed: copy it."""
    workdir = tmp_path_factory.mktemp('runs') / 'finished'
    return workdir, pipeline.run(tiny_config(), workdir)
