import fcntl
import json
import os
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest
from absl import flags

from robustprune_jax import pipeline
from robustprune_jax.config import TRAINED, default
from robustprune_jax.runtime.files import replacing

CACHE = Path.home() / '.cache' / 'robustprune_jax' / 'xla'
# Compiling is most of the tests' time: XLA optimises little, and keeps what it made for a next run.
for name, value in {
    'jax_disable_most_optimizations': True,
    'jax_compilation_cache_dir': os.environ.get('JAX_COMPILATION_CACHE_DIR', str(CACHE)),
    'jax_persistent_cache_min_compile_time_secs': 0,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the processes that tests start
COMPILES_FAST = '--xla_cpu_parallel_codegen_split_count=1'
if jaxlib.version.__version_info__ < (0, 11):  # the older of two code generators, in half the time
    COMPILES_FAST += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {COMPILES_FAST}'
flags.FLAGS.mark_as_parsed()  # Grain's threads read flags


# Files that take longest, so that no worker is left alone with one at the end.
SLOW = (
    'test_multiprocess.py',
    'test_interruptions.py',
    'test_end_to_end.py',
    'test_bounds.py',
    'test_channels.py',
    'test_steps.py',
    'test_verify.py',
    'test_expressive.py',
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (*SLOW, item.path.name).index(item.path.name))


@pytest.fixture(autouse=True)
def _optimised(request):
    """Tests marked `optimised` run long enough for XLA's optimisations to pay."""
    if not request.node.get_closest_marker('optimised'):
        yield
        return
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    """A folder of all workers of this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own


@pytest.fixture(scope='session')
def tiny_npz(shared):
    """12x12 images of 3 classes that a small network tells apart: a bright band, and noise."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (('train', 112), ('test', 40)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 12, 12, 1))
        for image, label in zip(images, labels, strict=True):
            image[4 * label : 4 * label + 4] += 130
        arrays |= {f'{part}_images': images.astype(np.uint8), f'{part}_labels': labels}
    path = shared / 'tiny.npz'
    with replacing(path) as temporary, temporary.open('wb') as file:
        np.savez(file, **arrays)
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
        config.report = False  # figures take longer than the training
        return config

    return make


@pytest.fixture(scope='session')
def finished(tiny_config, shared):
    """The workdir of a whole run, and what it returned. Not to be changed: copy it.

    The first worker that wants it makes it, for all of them.
    """
    workdir, returned = shared / 'finished', shared / 'finished.json'
    with (shared / 'finished.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not returned.exists():
            config = tiny_config()
            config.report = True
            returned.write_text(json.dumps(pipeline.run(config, workdir)))
    return workdir, json.loads(returned.read_text())
