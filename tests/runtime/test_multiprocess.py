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

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def small_config(tmp_path_factory):
    """A run with BatchNorm. Without an attack, which would amplify float32's rounding."""
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
    return {
        'arch': 'networks:Banded',
        'dataset.name': 'npz',
        'dataset.dir': str(path),
        'dataset.num_classes': 4,
        'dataset.validation': 4,
        'dataset.augment': 'crop_flip',
        'objective': 'natural',
        'evaluate.batch_size': 8,
        'evaluate.pgd.steps': 2,
        'log_every': 1,
        'report': False,
        'phases': 'pretrain,prune,evaluate',
        'evaluate.pruned': True,
        'pretrain.epochs': 1,
        'pretrain.batch_size': 16,
        'prune.epochs': 1,
        'prune.batch_size': 16,
    }


def command(config, workdir):
    flags = [f'--config.{field}={value}' for field, value in config.items()]
    return ['main.py', '--config=configs/digits.py', f'--workdir={workdir}', *flags]


def start(arguments, devices):
    """Starts a process with so many devices for each list of arguments."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([*sys.path, str(ROOT / 'tests')]),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': os.environ['XLA_FLAGS'] + f' --xla_force_host_platform_device_count={devices}',
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
def folders(small_config, tmp_path_factory):
    """The same programs, by two processes of two devices, and by one of four."""
    proved = small_config | {
        'objective': 'crown_ibp',
        'certified.eps': 0.02,
        'phases': 'pretrain,evaluate',
        'evaluate.examples': 12,
        'evaluate.pgd.eps': 0.02,
        'evaluate.certified.methods': 'ibp,crown',
        'evaluate.attack': 'fast',
        'evaluate.smooth.examples': 3,
        'evaluate.smooth.n': 50,
        'evaluate.smooth.batch_size': 16,
    }
    two, one = (tmp_path_factory.mktemp(name) for name in ('two', 'one'))
    program = 'tests/process_programs.py'
    run([[program, str(two), json.dumps({'pruned': small_config, 'proved': proved})]] * 2, 2)
    # The same network, evaluated by one process.
    proved |= {'phases': 'evaluate', 'source': str(two / 'proved/pretrain')}
    run([[program, str(one), json.dumps({'pruned': small_config, 'proved': proved})]], 4)
    return two, one


def test_two_processes_train_what_one_does(folders):
    for part in ('pruned/pretrain', 'pruned/density_0.1/hydra/prune'):
        a, b = (ravel_pytree(checkpoint.load(folder / part)[0])[0] for folder in folders)
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
        assert len(read_jsonl(folders[0] / part / 'metrics.jsonl')) == 5  # of one process


def test_two_processes_update_as_one_in_float64(folders):
    two, one = folders
    expected = np.load(one / 'process0.npy')
    assert expected.dtype == np.float64
    for index in range(2):
        found = np.load(two / f'process{index}.npy')
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def results(folders, name):
    return [json.loads((path / name / 'result.json').read_text())['networks'] for path in folders]


def test_two_processes_count_every_test_image_once(folders):
    """21 images in batches of 8: the last batch is filled up, and one device has nothing real."""
    of_two, of_one = results(folders, 'pruned')
    assert of_two == of_one
    assert [network['name'] for network in of_two] == ['pretrain', 'hydra_0.1_pruned']
    two, one = (folder / 'pruned/examples' for folder in folders)
    for path in two.iterdir():
        lines = read_jsonl(path)[1:]
        assert [line['index'] for line in lines] == list(range(21))
        assert lines == read_jsonl(one / path.name)[1:]


def test_two_processes_prove_and_attack_what_one_does(folders):
    """They ended in a traceback at the first bound."""
    (network,), (alone,) = results(folders, 'proved')
    assert set(network['robust']) == {'pgd', 'fast', 'ibp', 'crown', 'smooth'}
    for evaluation in network['robust']:
        name = f'proved/examples/pretrain.{evaluation}.jsonl'
        for a, b in zip(*(read_jsonl(path / name)[1:] for path in folders), strict=True):
            near = {
                k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in b.items()
            }
            assert a == near
    assert network['robust'] == alone['robust']


def test_a_stopped_run_goes_on_with_other_processes(folders, small_config, tmp_path):
    """SIGTERM to one of two processes; then one process with one device finishes."""
    workdir = tmp_path / 'run'
    source = str(folders[0] / 'pruned/pretrain')
    config = small_config | {'phases': 'prune', 'source': source, 'prune.epochs': 20}
    both = start([command(config, workdir)] * 2, 2)
    end = time.monotonic() + 300
    while not read_jsonl(workdir / 'density_0.1/hydra/prune/metrics.jsonl'):
        assert both[0].poll() is None, both[0].stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    for status, output in outputs(both):
        assert status == 0, output
    stopped = checkpoint.load_meta(workdir / 'density_0.1/hydra/prune')['step']
    assert 0 < stopped < 100

    run([command(config, workdir)], 1)
    steps = [line['step'] for line in read_jsonl(workdir / 'density_0.1/hydra/prune/metrics.jsonl')]
    assert steps == list(range(1, 101))


def test_processes_started_differently_are_refused(small_config, tmp_path):
    one, other = command(small_config, tmp_path / 'run'), command(small_config, 'elsewhere')
    for status, output in outputs(start([one, [*other, '--config.seed=1']], 1)):
        assert status == 1
        assert 'processes 0 and 1 were started differently: config.seed: 0, 1; workdir' in output
        assert 'Traceback' not in output
    assert not (tmp_path / 'run').exists()


def test_what_one_process_finds_wrong_ends_all(small_config, tmp_path):
    """A folder that is a file on the first one's disk only, as far as the others know."""
    (tmp_path / 'run').write_text('not a folder')
    for status, output in outputs(start([command(small_config, tmp_path / 'run')] * 2, 1)):
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
    impatient = [*command(small_config, tmp_path), '--join_timeout=5']
    first, second = start([impatient] * 2, 1)
    second.kill()
    second.communicate()
    ((status, output),) = outputs([first])
    assert status == 1
    (line,) = [line for line in output.splitlines() if 'error' in line]
    assert 'not every process had joined after 5 s' in line
