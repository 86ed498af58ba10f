import os
from pathlib import Path

# Before jax starts: compiled programs are most of the tests' time, and are the same every run.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(Path.home() / '.cache' / 'robustprune_jax' / 'xla')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')

from absl import flags

flags.FLAGS.mark_as_parsed()  # Grain's threads read flags
