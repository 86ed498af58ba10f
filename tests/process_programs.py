"""What many processes do as one: python tests/process_programs.py DIR RUNS, in each of them.

Writes to DIR: for each of RUNS, JSON of names and fields of the config, the workdir of a run; and
processINDEX.npy, the variables after five float64 steps of TRADES in prune, with BatchNorm and
augmentation. They share one start of the interpreter.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from device_programs import after
from jax.flatten_util import ravel_pytree

from robustprune_jax import pipeline
from robustprune_jax.config import default
from robustprune_jax.runtime import distributed

if __name__ == '__main__':
    flags.FLAGS.mark_as_parsed()  # Grain's threads read flags
    if distributed.found():
        distributed.start(60)
    folder = Path(sys.argv[1])
    with jax.enable_x64(True):
        state, _ = after(5, 'prune', 'trades', jax.device_count(), np.float64)
        np.save(folder / f'process{jax.process_index()}.npy', ravel_pytree(state.variables)[0])
    for name, fields in json.loads(sys.argv[2]).items():
        config = default()
        config.update_from_flattened_dict(fields)
        pipeline.run(config, folder / name)
