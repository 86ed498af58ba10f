"""What a phase tells: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from robustprune_jax.runtime.files import naming, read_jsonl, write_atomically


class PhaseLog:
    """The log of one phase, from `start_step` on; process 0 writes.

    metrics.jsonl is the truth: lines of steps after `start_step`, left by a killed run, are
    dropped. TensorBoard scalars are written beside it when tensorboardX is installed.
    """

    def __init__(
        self, directory: Path, name: str, start_step: int, total_steps: int, steps_per_epoch: int
    ):
        self._name, self._total, self._steps_per_epoch = name, total_steps, steps_per_epoch
        self._writes = jax.process_index() == 0
        self._file = self._scalars = None
        self._shown = {}
        self._mark = (time.monotonic(), 0)
        if self._writes:
            self._path = directory / 'metrics.jsonl'
            lines = read_jsonl(self._path, self.tell)
            kept = [line for line in lines if line.get('step', total_steps) <= start_step]
            write_atomically(self._path, ''.join(json.dumps(line) + '\n' for line in kept))
            self._file = self._path.open('a')
            if importlib.util.find_spec('tensorboardX'):
                self._scalars = _Scalars(directory, start_step)
        self._lines = self._writes and not sys.stderr.isatty()
        self._bar = tqdm(
            desc=name,
            total=total_steps,
            initial=start_step,
            unit='step',
            disable=not self._writes or self._lines,
        )

    def __enter__(self) -> 'PhaseLog':
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        for sink in (self._file, self._scalars):
            if sink:
                with naming(self._path):
                    sink.close()

    def step(self, images: int) -> None:
        """Counts one step of so many images."""
        self._bar.update()
        self._mark = (self._mark[0], self._mark[1] + images)

    def write(self, step: int, **values: float) -> None:
        """Appends one line: step, epoch, the values; shows the latest of each."""
        if not self._writes:
            return
        line = {'step': step, 'epoch': round(step / self._steps_per_epoch, 4), **values}
        with naming(self._path):
            self._file.write(json.dumps(line) + '\n')
            self._file.flush()
            if self._scalars:
                self._scalars.write(step, values)
        rates = ('learning_rate', 'images_per_second')  # no room for them
        self._shown |= {key: f'{v:.3g}' for key, v in values.items() if key not in rates}
        self._bar.set_postfix(self._shown)
        if self._lines:
            shown = '  '.join(f'{key} {value:.4g}' for key, value in values.items())
            print(f'{self._name}  step {step}/{self._total}  {shown}', flush=True)

    def tell(self, sentence: str) -> None:
        """Prints a sentence about the phase."""
        if self._writes:
            print(f'{self._name}: {sentence}', flush=True)

    def images_per_second(self) -> float:
        """Returns the rate since the last call."""
        now, (then, images) = time.monotonic(), self._mark
        self._mark = (now, 0)
        return images / (now - then)


class _Scalars:
    """A file of TensorBoard's, beside metrics.jsonl, that is written to in this thread.

    SummaryWriter has a thread of its own: where the disk is full it ends, and then a full queue
    stops the training for ever.
    """

    def __init__(self, directory: Path, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._events = EventsWriter(str(directory / 'events'))
        # Makes TensorBoard forget what a killed run wrote of later steps.
        started = SessionLog(status=SessionLog.START)
        self._events.write_event(
            Event(wall_time=time.time(), step=start_step + 1, session_log=started)
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        self._events.close()
