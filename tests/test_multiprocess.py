"""Real processes on one machine, each with its own devices, against one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.training import checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def small_config(tmp_path_factory):
    """Flags of a run with BatchNorm. Without an attack, which would amplify float32's rounding."""
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
        '--config.objective=natural',
        '--config.evaluate.batch_size=8',
        '--config.evaluate.pgd.steps=2',
        '--config.log_every=1',
        '--config.phases=pretrain,prune,evaluate',
        '--config.evaluate.pruned=True',
        '--config.pretrain.epochs=1',
        '--config.pretrain.batch_size=16',
        '--config.prune.epochs=1',
        '--config.prune.batch_size=16',
    ]


def start(arguments, devices):
    """Starts a process with so many devices for each list of arguments."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    }
    if len(arguments) > 1:
        environment |= {
            'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
            'JAX_NUM_PROCESSES': str(len(arguments)),
        }
    return [
        subprocess.Popen(
            [sys.executable, *own],
            cwd=ROOT,
            env={**environment, 'JAX_PROCESS_ID': str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, own in enumerate(arguments)
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


def run(*arguments):
    for status, output in outputs(start(*arguments)):
        assert status == 0, output


@pytest.fixture(scope='module')
def runs(small_config, tmp_path_factory):
    """The same run, by two processes of two devices, and by one of four."""
    workdir = tmp_path_factory.mktemp('runs')
    for name, processes, devices in (('two', 2, 2), ('one', 1, 4)):
        run([['main.py', f'--workdir={workdir / name}', *small_config]] * processes, devices)
    return workdir / 'two', workdir / 'one'


def test_two_processes_train_what_one_does(runs):
    for part in ('pretrain', 'density_0.1/hydra/prune'):
        a, b = (ravel_pytree(checkpoint.load(path / part)[0])[0] for path in runs)
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
        assert len(read_jsonl(runs[0] / part / 'metrics.jsonl')) == 5  # of one process


def test_two_processes_update_as_one_in_float64(tmp_path, monkeypatch):
    """Five steps of TRADES in prune, with BatchNorm and augmentation."""
    monkeypatch.setenv('JAX_ENABLE_X64', '1')
    program = 'tests/device_programs.py'
    run([[program, 'save', str(tmp_path / f'two{i}.npy')] for i in range(2)], 2)
    run([[program, 'save', str(tmp_path / 'one.npy')]], 4)
    one, *two = (np.load(tmp_path / f'{name}.npy') for name in ('one', 'two0', 'two1'))
    assert one.dtype == np.float64
    for vector in two:
        np.testing.assert_allclose(vector, one, rtol=1e-9, atol=1e-9)


def test_two_processes_count_every_test_image_once(runs):
    """21 images in batches of 8: the last batch is filled up, and one device has nothing real."""
    two, one = runs
    results = [json.loads((run / 'result.json').read_text())['networks'] for run in runs]
    assert results[0] == results[1]
    assert [network['name'] for network in results[0]] == ['pretrain', 'pruned_0.1']
    for path in (two / 'examples').iterdir():
        lines = read_jsonl(path)[1:]
        assert [line['index'] for line in lines] == list(range(21))
        assert lines == read_jsonl(one / 'examples' / path.name)[1:]


def test_two_processes_prove_and_attack_what_one_does(small_config, tmp_path):
    """They ended in a traceback at the first bound. The same network, evaluated by one process."""
    flags = [
        *small_config,
        '--config.arch=mnist_model',
        '--config.objective=crown_ibp',
        '--config.certified.eps=0.02',
        '--config.evaluate.examples=12',
        '--config.evaluate.pgd.eps=0.02',
        '--config.evaluate.certified.methods=ibp,crown',
        '--config.evaluate.attack=standard',
        '--config.evaluate.smooth.examples=3',
        '--config.evaluate.smooth.n=50',
        '--config.evaluate.smooth.batch_size=16',
    ]
    two, one = tmp_path / 'two', tmp_path / 'one'
    run([['main.py', f'--workdir={two}', *flags, '--config.phases=pretrain,evaluate']] * 2, 1)
    source = ['--config.phases=evaluate', f'--config.source={two / "pretrain"}']
    run([['main.py', f'--workdir={one}', *flags, *source]], 1)
    (network,), (alone,) = (
        json.loads((path / 'result.json').read_text())['networks'] for path in (two, one)
    )
    assert set(network['robust']) == {'pgd', 'standard', 'ibp', 'crown', 'smooth'}
    for evaluation in network['robust']:
        name = f'examples/pretrain.{evaluation}.jsonl'
        for a, b in zip(*(read_jsonl(path / name)[1:] for path in (two, one)), strict=True):
            near = {
                k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in b.items()
            }
            assert a == near
    assert network['robust'] == alone['robust']


def test_a_stopped_run_goes_on_with_other_processes(runs, small_config, tmp_path):
    """SIGTERM to one of two processes; then one process with one device finishes."""
    workdir = tmp_path / 'run'
    flags = [
        *small_config,
        '--config.phases=prune',
        f'--config.source={runs[0] / "pretrain"}',
        '--config.prune.epochs=40',
    ]
    command = ['main.py', f'--workdir={workdir}', *flags]
    both = start([command] * 2, 2)
    end = time.monotonic() + 300
    while not read_jsonl(workdir / 'density_0.1/hydra/prune/metrics.jsonl'):
        assert both[0].poll() is None, both[0].stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    for status, output in outputs(both):
        assert status == 0, output
    stopped = checkpoint.load_meta(workdir / 'density_0.1/hydra/prune')['step']
    assert 0 < stopped < 200

    run([command], 1)
    steps = [line['step'] for line in read_jsonl(workdir / 'density_0.1/hydra/prune/metrics.jsonl')]
    assert steps == list(range(1, 201))


def test_processes_started_differently_are_refused(small_config, tmp_path):
    command = ['main.py', f'--workdir={tmp_path / "run"}', *small_config]
    other = [*command, '--config.seed=1', '--workdir=elsewhere']
    for status, output in outputs(start([command, other], 1)):
        assert status == 1
        assert 'processes 0 and 1 were started differently: config.seed: 0, 1; workdir' in output
        assert 'Traceback' not in output
    assert not (tmp_path / 'run').exists()


def test_what_one_process_finds_wrong_ends_all(small_config, tmp_path):
    """A folder that is a file on the first one's disk only, as far as the others know."""
    (tmp_path / 'run').write_text('not a folder')
    command = ['main.py', f'--workdir={tmp_path / "run"}', *small_config]
    for status, output in outputs(start([command] * 2, 1)):
        assert status == 1
        assert 'run' in output and 'error: ' in output and 'Traceback' not in output


def test_any_error_of_one_process_ends_all():
    program = (
        'from robustprune_jax.runtime import distributed\n'
        'import jax\n'
        'distributed.start(60)\n'
        'try:\n'
        '    with distributed.together():\n'
        '        {}["a name"] if jax.process_index() else None\n'
        'except Exception as error:\n'
        '    distributed.fail(f"{type(error).__name__}: {error}")\n'
    )
    (_, first), (_, second) = outputs(start([['-c', program]] * 2, 1), timeout=60)
    assert "ValueError: process 1: 'a name'" in first
    assert "KeyError: 'a name'" in second


def test_a_process_that_never_joins_ends_the_wait(small_config, tmp_path):
    command = ['main.py', f'--workdir={tmp_path}', *small_config, '--join_timeout=5']
    first, second = start([command] * 2, 1)
    second.kill()
    second.communicate()
    ((status, output),) = outputs([first])
    assert status == 1
    (line,) = [line for line in output.splitlines() if 'error' in line]
    assert 'not every process had joined after 5 s' in line
