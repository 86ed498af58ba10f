"""Checkpoints of a phase (Orbax v1): the newest two and the best, readable on any topology.

Items: `variables` (all that evaluation and export need), `average` (the same of the averaged
network, where there is one), `optimizer` (the rest of the train
state), `data` (the iterator's position), `meta` (JSON: arch, num_classes, image_shape, phase,
method, density, criterion, allocation, structure, objective, step, epoch, total_steps).
`checksums.json` has the CRC-32 of every file: what Orbax reads from a damaged one is other weights,
or an error that names no file.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from robustprune_jax.runtime.files import write_atomically
from robustprune_jax.training.state import TrainState

CHECKSUMS = 'checksums.json'

_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one phase while it trains, as a context manager that waits for saves.

    Keeps the newest, the one before, which stands in where the newest is damaged, and the one with
    the best metric 'quality'. Raises OSError, in one line, where a checkpoint cannot be saved.
    """

    def __init__(self, directory: Path | str):
        self._directory = Path(directory).absolute()
        policy = _policies.AnyPreservationPolicy(
            [
                _policies.LatestN(2),
                _policies.BestN(
                    get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        with _saving(self._directory):
            self._orbax = ocp.training.Checkpointer(
                self._directory, preservation_policy=policy, cleanup_tmp_directories=True
            )
        self._pending = None

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *exception) -> None:
        try:
            self.wait()
        finally:
            with _saving(self._directory):
                self._orbax.close()

    def save(
        self, state: TrainState, networks: dict, data: Any, meta: dict, quality: float | None
    ) -> None:
        """Saves one step, in the background.

        networks: the state's `variables` and, where there is one, `average`, with the masks.
        quality: the metric that chooses the best; None where it was not measured.
        """
        items = {
            **networks,
            'optimizer': _rest(state),
            'data': _Position(data),
            'meta': meta,
        }
        self.save_items(meta['step'], items, None if quality is None else {'quality': quality})

    def save_items(self, step: int, items: dict[str, Any], metrics: dict | None = None) -> None:
        """Saves some items as one step, in the background."""
        self.wait()
        size = sum(getattr(leaf, 'nbytes', 0) for leaf in jax.tree.leaves(items))
        with _saving(self._directory):
            free = shutil.disk_usage(self._directory).free
            if free < size:  # Orbax would say so in tracebacks of its threads
                raise OSError(f'{free / 2**20:.1f} MiB are free, {size / 2**20:.1f} needed')
            # Without force a save is silently skipped while another is in progress.
            self._pending = self._orbax.save_checkpointables_async(
                step, items, metrics=metrics, force=True
            )
        self._pending.on_complete(lambda _: _seal(self._directory / str(step)))

    def wait(self) -> None:
        """Returns when the latest save is complete."""
        pending, self._pending = self._pending, None
        if pending:
            with _saving(self._directory):
                pending.result()

    def restore(self, state: TrainState, data: Any) -> TrainState:
        """Returns the newest train state, in the shardings of `state`, with `data` moved to its
        position; `state` as it is where there is no checkpoint."""
        if not self._orbax.latest:
            return state
        networks = {'variables': state.variables}
        if state.average:
            networks['average'] = state.average
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {**networks, 'optimizer': _rest(state)},
        )
        step = self._orbax.latest.step
        with _reading(self._directory / str(step)) as folder:
            # All that was saved has to be named, also the masks, which prune computes from the
            # scores.
            for item in networks:
                abstract[item] = {**_abstract_variables(folder, item), **abstract[item]}
            items = self._orbax.load_checkpointables(step, {**abstract, 'data': _Position(data)})
        found = {
            item: {name: items[item][name] for name in network}
            for item, network in networks.items()
        }
        return state.replace(**found, **items['optimizer'])


def _quality(metrics):
    return (metrics or {}).get('quality', -1.0)


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


def _rest(state):
    return {
        'step': state.step,
        'optimizer': state.optimizer,
        'carry': state.carry,
        'first_nan': state.first_nan,
    }


def _abstract_variables(folder, item):
    # Of this item alone: the metadata of `data` cannot be read, and Orbax complains of it.
    shapes = ocp.metadata(folder, item).metadata
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # a process was lost
        raise
    except Exception as error:  # Orbax raises what its threads met: from TensorStore a ValueError
        reason = str(error).partition('\n')[0]
        raise OSError(f'cannot save a checkpoint in {directory}: {reason}') from error


@contextlib.contextmanager
def _reading(folder: Path, *items: str) -> Iterator[Path]:
    """Gives the folder of a checkpoint; raises ValueError where (an item of) it is damaged."""
    advice = f'move {folder} away, and the checkpoint before it counts'
    if damaged := _damaged(folder, items):
        raise ValueError(f'{damaged} is damaged: {advice}')
    try:
        yield folder
    except jax.errors.JaxRuntimeError:  # of the device, not of the file
        raise
    except Exception as error:  # damaged files without checksums may raise anything
        reason = str(error).partition('\n')[0]
        raise ValueError(f'{folder} cannot be read ({reason:.300}): {advice}') from error


def _seal(folder: Path) -> None:
    """Writes the checksums of a new checkpoint."""
    if jax.process_index():
        return
    with contextlib.suppress(OSError):  # a full disk: the next save says so
        files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
        sums = {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}
        write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=0) + '\n')


def _damaged(folder: Path, items: tuple[str, ...] = ()) -> Path | None:
    """Returns a file, of some items or of all, that is not as it was saved; None if there is none.

    A checkpoint has no checksums when it is of an older version, or its run was killed just then.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        sums = json.loads(path.read_text()).items()
    except (ValueError, AttributeError):
        return path
    for name, checksum in sums:
        file = folder / name
        if items and name.partition('/')[0] not in items:
            continue
        if not file.is_file() or zlib.crc32(file.read_bytes()) != checksum:
            return file
    return None


def set_damaged_aside(path: Path | str) -> list[str]:
    """Renames the newest checkpoints of a phase while they are damaged, so that it goes on from
    the one before them. Returns a sentence on each."""
    sentences = []
    for step in reversed(_steps(Path(path) / 'checkpoints')):
        folder = Path(path) / 'checkpoints' / str(step)
        damaged = _damaged(folder)
        if not damaged:
            break
        aside = folder.with_name(f'{step}.damaged')
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        sentences.append(f'{damaged} is damaged: the checkpoint before counts, this one is {aside}')
    return sentences


def _steps(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(child.name) for child in directory.iterdir() if child.name.isdigit())


def locate(path: Path | str) -> Path:
    """Returns the checkpoint directory at `path`: itself, or its folder `checkpoints`.

    Raises FileNotFoundError when there is no checkpoint.
    """
    path = Path(path)
    for directory in (path / 'checkpoints', path):
        if _steps(directory):
            return directory
    raise FileNotFoundError(
        f'no checkpoint in {path}: expected a folder of a phase, such as RUN/pretrain/checkpoints'
    )


def load(path: Path | str, which: str | int = 'latest') -> tuple[dict, dict]:
    """Returns (variables, meta) of a saved network, as numpy arrays, on any topology.

    which: 'latest', 'best', a step, or 'average': the latest's average, which is itself where it
    was not trained here. Raises FileNotFoundError when there is no such checkpoint, ValueError
    when it is damaged.
    """
    directory = locate(path).absolute()
    steps = _steps(directory)
    if which == 'best':
        with ocp.training.Checkpointer(directory) as checkpoints:
            saved = {c.step: _quality(c.metrics) for c in checkpoints.checkpoints}
        step = max(saved, key=lambda step: (saved[step], step))
    else:
        step = steps[-1] if which in ('latest', 'average') else which
    if step not in steps:
        raise FileNotFoundError(f'no step {step} in {directory}: there are {steps}')
    with _reading(directory / str(step), 'meta') as folder:
        meta = _meta(folder)
    _check_version(meta, folder)
    item = 'average' if which == 'average' and meta['total_steps'] else 'variables'
    if item == 'average' and not (folder / item).is_dir():
        raise FileNotFoundError(f'no average in {folder}: config.average.decay was 0')
    with _reading(folder, item):
        shapes = _abstract_variables(folder, item)
        return ocp.load(folder, shapes, checkpointable_name=item), meta


def load_meta(path: Path | str) -> dict:
    """Returns the meta item of the latest checkpoint; raises FileNotFoundError without one,
    ValueError when it is damaged."""
    directory = locate(path).absolute()
    with _reading(directory / str(_steps(directory)[-1]), 'meta') as folder:
        meta = _meta(folder)
    _check_version(meta, folder)
    return meta


def _meta(folder):
    return ocp.load_checkpointables(folder, {'meta': None})['meta']


def _check_version(meta, folder):
    if 'method' not in meta:
        raise ValueError(
            f'{folder} was saved by robustprune_jax 0.1: its conversion.to_torch makes a file of '
            "it, and this version's conversion.from_torch a checkpoint of that"
        )


def is_finished(path: Path | str) -> bool:
    """Returns whether a phase has a checkpoint of its last step."""
    try:
        meta = load_meta(path)
    except FileNotFoundError:
        return False
    return meta['step'] >= meta['total_steps']


def save_network(directory: Path | str, variables: dict, meta: dict) -> None:
    """Saves a network without a train state, for `load` and `config.source`.

    meta: at least arch, num_classes, image_shape, phase ('pretrain', 'prune', 'finetune') and
    density (None before pruning); method, where it is known.
    """
    meta = {'method': None, 'step': 0, 'epoch': 0, 'total_steps': 0, **meta}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save_items(meta['step'], {'variables': variables, 'meta': meta})
