"""Many devices against one: the same update, whatever the number of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustprune_jax.runtime.sharding import check_batch_size


@pytest.fixture(scope='module')
def errors():
    """The error of each device program, or None."""
    run = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / 'device_programs.py'],
        env={
            **os.environ,
            'XLA_FLAGS': os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=8',
            'JAX_PLATFORMS': 'cpu',
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    'name', ['trades', 'free', 'per_device', 'per_device_attacked', 'natural', 'collectives']
)
def test_on_simulated_devices(errors, name):
    assert not errors[name], errors[name]


def test_a_batch_is_divided_into_parts():
    check_batch_size(12, 'config.prune.batch_size', 4)
    message = r'of 4, for 1 devices in 4 parts each \(config.accumulate\); nearest: '
    for size, nearest in ((13, 12), (0, 4)):
        with pytest.raises(ValueError, match=f'{message}{nearest}'):
            check_batch_size(size, 'config.prune.batch_size', 4)
