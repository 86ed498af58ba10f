"""Real processes on one machine, each with its own devices, against one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from robustprune_jax import checkpoint
from robustprune_jax.files import read_jsonl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def small_config(tmp_path_factory):
    """Flags of a run with BatchNorm whose updates differ much where a step goes wrong."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (('train', 84), ('test', 21)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 120, (count, 16, 16, 3))
        for image, label in zip(images, labels, strict=True):
            image[4 * label : 4 * label + 4] += 120
        arrays |= {f'{part}_images': images.astype(np.uint8), f'{part}_labels': labels}
    path = tmp_path_factory.mktemp('data') / 'bands.npz'
    np.savez(path, **arrays)
    return [
        '--config=configs/digits.py',
        '--config.arch=vgg2_bn',
        '--config.dataset.name=npz',
        f'--config.dataset.dir={path}',
        '--config.dataset.num_classes=4',
        '--config.dataset.validation=4',
        '--config.dataset.augment=crop_flip',
        '--config.attack.steps=2',
        '--config.evaluate.batch_size=8',
        '--config.evaluate.pgd.steps=2',
        '--config.log_every=1',
        '--config.phases=pretrain,prune,evaluate',
        '--config.evaluate.pruned=True',
        '--config.pretrain.epochs=1',
        '--config.pretrain.batch_size=16',
        '--config.prune.epochs=4',
        '--config.prune.batch_size=16',
    ]


def start(workdir, flags, processes, devices, **variables):
    """Starts main.py in so many processes with so many devices each."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        **variables,
    }
    if processes > 1:
        environment |= {
            'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
            'JAX_NUM_PROCESSES': str(processes),
        }
    return [
        subprocess.Popen(
            [sys.executable, 'main.py', f'--workdir={workdir}', *flags[rank % len(flags)]],
            cwd=ROOT,
            env={**environment, 'JAX_PROCESS_ID': str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def outputs(running, timeout=300):
    """Returns (exit status, output) of each process."""
    try:
        return [
            (process.returncode, output)
            for process in running
            for output in [process.communicate(timeout=timeout)[0]]
        ]
    finally:
        for process in running:
            process.kill()


def run(*arguments, **variables):
    for status, output in outputs(start(*arguments, **variables)):
        assert status == 0, output


def assert_close(one, other, tolerance):
    one, other = (checkpoint.load(path)[0] for path in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), one, other)


@pytest.fixture(scope='module')
def runs(small_config, tmp_path_factory):
    """The same run, in float64: two processes of two devices, and one of four."""
    workdir = tmp_path_factory.mktemp('runs')
    run(workdir / 'two', [small_config], 2, 2, JAX_ENABLE_X64='1')
    run(workdir / 'one', [small_config], 1, 4, JAX_ENABLE_X64='1')
    return workdir / 'two', workdir / 'one'


def test_two_processes_train_what_one_does(runs):
    two, one = runs
    for part, steps in (('pretrain', 5), ('density_0.1/prune', 20)):
        assert_close(two / part, one / part, 1e-9)
        assert len(read_jsonl(two / part / 'metrics.jsonl')) == steps  # of one process


def test_two_processes_count_every_test_image_once(runs):
    """21 images in batches of 8: the last batch is filled up, and one device has nothing real."""
    two, one = runs
    results = [json.loads((run / 'result.json').read_text())['networks'] for run in runs]
    assert results[0] == results[1]
    assert [network['name'] for network in results[0]] == ['pretrain', 'pruned_0.1']
    for path in (two / 'examples').iterdir():
        header, *lines = read_jsonl(path)
        assert [line['index'] for line in lines] == list(range(21))
        assert [header, *lines] == read_jsonl(one / 'examples' / path.name)


def test_a_stopped_run_goes_on_with_other_processes(runs, small_config, tmp_path):
    """SIGTERM to one of two processes; then one process with one device finishes."""
    workdir = tmp_path / 'run'
    both = start(workdir, [small_config], 2, 2, JAX_ENABLE_X64='1')
    end = time.monotonic() + 300
    while not read_jsonl(workdir / 'density_0.1/prune/metrics.jsonl'):
        assert both[0].poll() is None, both[0].stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    for status, output in outputs(both):
        assert status == 0, output
    assert not checkpoint.is_finished(workdir / 'density_0.1/prune')

    run(workdir, [small_config], 1, 1, JAX_ENABLE_X64='1')
    assert_close(workdir / 'density_0.1/prune', runs[1] / 'density_0.1/prune', 1e-9)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.seed=1'], 'processes 0 and 1 were started differently: config.seed: 0, 1'),
        (['--config.dataset.dir=nowhere.npz'], 'config.dataset.dir'),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(small_config, tmp_path, flags, message):
    both = start(tmp_path / 'run', [small_config, [*small_config, *flags]], 2, 1)
    for status, output in outputs(both):
        assert status == 1
        assert message in output and 'Traceback' not in output
    assert not (tmp_path / 'run').exists()


def test_a_process_that_never_joins_ends_the_wait(small_config, tmp_path):
    first, second = start(tmp_path, [[*small_config, '--join_timeout=5']], 2, 1)
    second.kill()
    ((status, output),) = outputs([first])
    assert status == 1
    (line,) = [line for line in output.splitlines() if 'error' in line]
    assert 'not every process had joined after 5 s' in line
