"""A trace of some training steps, for xprof."""

from pathlib import Path

import jax


class Profile:
    """Traces the steps that `config.profile` names, 'FROM:TO', into a folder; '' traces none.

    A trace is written at the end of step TO, or of the block; a phase that goes on after FROM has
    none.
    """

    def __init__(self, steps: str, folder: Path):
        self._first, self._last = (int(x) for x in steps.split(':')) if steps else (0, 0)
        self._folder, self._runs = folder, False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._runs = True

    def after(self, step: int, metrics: dict) -> None:
        if step == self._last and self._runs:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._runs = False

    def __enter__(self) -> 'Profile':
        return self

    def __exit__(self, *raised) -> None:
        if self._runs:
            self._stop()
