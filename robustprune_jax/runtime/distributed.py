"""Processes that run one program together, on one host or many: start, agreement, preemption.

Nothing here costs or changes anything where there is one process.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from robustprune_jax.runtime.files import differences

# The number of processes, as launchers tell it to each of them.
COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')

_polls = itertools.count(1)


def found() -> bool:
    """Returns whether the environment is that of one process among several."""
    several = any(os.environ.get(name, '1') != '1' for name in COUNTS)
    return several or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')


def start(timeout: float) -> None:
    """Joins the other processes, before any use of jax.

    SLURM, Open MPI, GKE and Cloud TPU say where they are; anywhere else JAX_COORDINATOR_ADDRESS
    (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do. Raises ValueError where
    nothing says it. When after `timeout` seconds not all have joined, the process ends with one
    line and exit status 1: jax would abort it, with a stack trace, where nothing can be caught.
    """
    address = os.environ.get('JAX_COORDINATOR_ADDRESS')

    def number(name):
        text = os.environ.get(name)
        if text is not None and not text.isdigit():
            raise ValueError(f'{name} is {text!r}: expected a number')
        return None if text is None else int(text)

    count, index = (number(f'JAX_{name}') for name in ('NUM_PROCESSES', 'PROCESS_ID'))

    def give_up():
        here = f'process {index} of {count}, coordinator {address}' if address else 'this process'
        print(
            f'error: not every process had joined after {timeout:g} s ({here}): start the same '
            'command on every host, check that process 0 can be reached, or raise --join_timeout; '
            '--nodistributed runs without the others',
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address, count, index, initialization_timeout=int(2 * timeout + 10)
        )
    except ValueError as error:
        raise ValueError(
            f'no cluster found ({error}): set JAX_COORDINATOR_ADDRESS=HOST:PORT, '
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave out --distributed'
        ) from None
    finally:
        timer.cancel()
    # jax aborts a process when another is lost, and says so: no stack of every thread after that.
    faulthandler.disable()


def fail(message: str) -> NoReturn:
    """Ends the process with a message and exit status 1."""
    if jax.process_count() == 1:
        sys.exit(message)
    # At a normal exit jax waits minutes for the others, which may be gone, or wait for this one.
    print(message, file=sys.stderr, flush=True)
    time.sleep(1)  # without process 0 the others would not get to say what went wrong
    os._exit(1)


def exchange(value: Any) -> list:
    """Returns the `value`, JSON data, of every process, by process; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.pad(data, (0, sizes.max() - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree(values: dict) -> None:
    """Raises ValueError, on every process, where one has other values than process 0."""
    every = exchange(values)
    for index, other in enumerate(every):
        found = '; '.join(differences(every[0], other))
        if found:
            raise ValueError(f'processes 0 and {index} were started differently: {found}')


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises, on every process, what one of them raises inside: else the others would wait for it.

    There must be no collective inside.
    """
    own = None
    try:
        yield
    except Exception as error:  # any: the others wait in the exchange below
        own = error
    messages = exchange(None if own is None else str(own) or repr(own))
    if own is not None:
        raise own
    for index, message in enumerate(messages):
        if message is not None:
            raise ValueError(f'process {index}: {message}')


def gather(tree: Any) -> Any:
    """Returns the arrays of a pytree, whole, as numpy, on every process; the rest as it is."""
    return jax.tree.map(
        lambda leaf: (
            multihost_utils.process_allgather(leaf, tiled=True)
            if isinstance(leaf, jax.Array)
            else leaf
        ),
        tree,
    )


def preempted() -> bool:
    """Returns whether some process was asked to stop (SIGTERM, or a notice of the cluster).

    Every process gets True at the same call, so all must call it equally often. Always False for
    one process, whose signals are its own.
    """
    if jax.process_count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(next(_polls))
