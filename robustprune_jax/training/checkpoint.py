"""Checkpoints of a phase (Orbax v1): the latest and the best, readable on any topology.

Items: `variables` (all that evaluation and export need), `optimizer` (the rest of the train
state), `data` (the iterator's position), `meta` (JSON: arch, num_classes, image_shape, phase,
density, objective, step, epoch, total_steps).
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from robustprune_jax.training.state import TrainState

_policies = ocp.training.preservation_policies


def _quality(metrics):
    return (metrics or {}).get('quality', -1.0)


def open_checkpoints(directory: Path | str) -> ocp.training.Checkpointer:
    """Returns the checkpoints of one phase, as a context manager that waits for pending saves.

    Keeps the newest, and the one with the best metric 'quality'. Retention by best alone would
    delete the newest, and a preempted job would start over.
    """
    policy = _policies.AnyPreservationPolicy(
        [_policies.LatestN(1), _policies.BestN(get_metric_fn=_quality, n=1)]
    )
    return ocp.training.Checkpointer(
        Path(directory).absolute(), preservation_policy=policy, cleanup_tmp_directories=True
    )


class _Position:
    """Saves and loads the position of a Grain iterator, which is the same on every process.

    Grain's own way keeps a file for each process, and wants as many at a restart.
    """

    FILE = 'process_0-of-1.json'  # Grain's name for one process

    def __init__(self, data):
        self._data = data

    async def save(self, directory):
        state = json.dumps(self._data.get_state())

        async def write():
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                (folder / self.FILE).write_text(state)

        return write()

    async def load(self, directory):
        async def read():
            self._data.set_state(json.loads((directory / self.FILE).read_text()))

        return read()


def save(
    checkpoints: ocp.training.Checkpointer,
    state: TrainState,
    variables: dict,
    data: Any,
    meta: dict,
    quality: float | None,
) -> None:
    """Saves one step, in the background. `variables` are the state's, with the masks.

    quality: the metric that chooses the best; None where it was not measured.
    """
    items = {
        'variables': variables,
        'optimizer': _rest(state),
        'data': _Position(data),
        'meta': meta,
    }
    metrics = None if quality is None else {'quality': quality}
    # Without force a save is silently skipped while another is in progress.
    checkpoints.save_checkpointables_async(meta['step'], items, metrics=metrics, force=True)


def restore(checkpoints: ocp.training.Checkpointer, state: TrainState, data: Any) -> TrainState:
    """Returns the newest train state, in the shardings of `state`; moves `data` to its position."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {'variables': state.variables, 'optimizer': _rest(state)},
    )
    step = checkpoints.latest.step
    # All that was saved has to be named, also the masks, which prune computes from the scores.
    abstract['variables'] = {**_abstract_variables(checkpoints, step), **abstract['variables']}
    items = checkpoints.load_checkpointables(step, {**abstract, 'data': _Position(data)})
    variables = {name: items['variables'][name] for name in state.variables}
    return state.replace(variables=variables, **items['optimizer'])


def _rest(state):
    return {
        'step': state.step,
        'optimizer': state.optimizer,
        'carry': state.carry,
        'first_nan': state.first_nan,
    }


def _abstract_variables(checkpoints, step):
    # Of this item alone: the metadata of `data` cannot be read, and Orbax complains of it.
    shapes = ocp.metadata(Path(checkpoints.directory) / str(step), 'variables').metadata
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)


def locate(path: Path | str) -> Path:
    """Returns the checkpoint directory at `path`: itself, or its folder `checkpoints`.

    Raises FileNotFoundError when there is no checkpoint.
    """
    path = Path(path)
    for directory in (path / 'checkpoints', path):
        if directory.is_dir() and any(child.name.isdigit() for child in directory.iterdir()):
            return directory
    raise FileNotFoundError(
        f'no checkpoint in {path}: expected a folder of a phase, such as RUN/pretrain/checkpoints'
    )


def load(path: Path | str, which: str | int = 'latest') -> tuple[dict, dict]:
    """Returns (variables, meta) of a saved network, as numpy arrays, on any topology.

    which: 'latest', 'best' or a step. Raises FileNotFoundError when there is no such checkpoint.
    """
    directory = locate(path)
    with ocp.training.Checkpointer(directory.absolute()) as checkpoints:
        saved = {c.step: _quality(c.metrics) for c in checkpoints.checkpoints}
        if which == 'best':
            step = max(saved, key=lambda step: (saved[step], step))
        else:
            step = max(saved) if which == 'latest' else which
        if step not in saved:
            raise FileNotFoundError(f'no step {step} in {directory}: there are {sorted(saved)}')
        meta = checkpoints.load_checkpointables(step, {'meta': None})['meta']
        variables = checkpoints.load(
            step, _abstract_variables(checkpoints, step), checkpointable_name='variables'
        )
    return variables, meta


def load_meta(path: Path | str) -> dict:
    """Returns the meta item of the latest checkpoint; raises FileNotFoundError without one."""
    directory = locate(path)
    with ocp.training.Checkpointer(directory.absolute()) as checkpoints:
        return checkpoints.load_checkpointables(None, {'meta': None})['meta']


def is_finished(path: Path | str) -> bool:
    """Returns whether a phase has a checkpoint of its last step."""
    try:
        meta = load_meta(path)
    except FileNotFoundError:
        return False
    return meta['step'] >= meta['total_steps']


def save_network(directory: Path | str, variables: dict, meta: dict) -> None:
    """Saves a network without a train state, for `load` and `config.source`.

    meta: at least arch, num_classes, image_shape, phase ('pretrain', 'prune', 'finetune', 'lwm')
    and density (None before pruning).
    """
    meta = {'step': 0, 'epoch': 0, 'total_steps': 0, **meta}
    with open_checkpoints(directory) as checkpoints:
        checkpoints.save_checkpointables(meta['step'], {'variables': variables, 'meta': meta})
