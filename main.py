"""Runs one experiment: python main.py --config=configs/digits.py --workdir=runs/digits."""

import os
import signal
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from robustprune_jax import pipeline
from robustprune_jax.runtime import distributed

EXPECTED = ValueError, NotImplementedError, OSError, FloatingPointError

CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'Experiment, with its argument: configs/digits.py:density=0.01',
    lock_config=True,
)
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; the same command goes on from where it was.'
)
DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    None,
    'Join the other processes of a cluster; by default where the launcher tells of several.',
)
JOIN_TIMEOUT = flags.DEFINE_integer(
    'join_timeout', 300, 'Seconds until a process that never joins ends the others.', 1
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'))
        jax.config.update('jax_compilation_cache_dir', str(cache / 'robustprune_jax' / 'xla'))
    # As Ctrl-C, so that the workdir is unlocked; training, and jax among several, do more with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if distributed.found() if DISTRIBUTED.value is None else DISTRIBUTED.value:
            distributed.start(JOIN_TIMEOUT.value)
        pipeline.run(CONFIG.value, WORKDIR.value)
    except KeyboardInterrupt:
        sys.exit('interrupted; the same command goes on from what is saved.')
    except (*EXPECTED, jax.errors.JaxRuntimeError) as error:
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        if lost and jax.process_count() == 1:
            raise
        logging.debug('', exc_info=True)  # the traceback: --verbosity=1
        hint = '; if a process is gone, the same command on every host goes on' if lost else ''
        distributed.fail(f'error: {error}{hint}')


def parse_flags(argv: list[str]) -> list[str]:
    """Returns the arguments that are no flags; a bad flag or config ends in one line."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps what is wrong
            error = error.args[0]
        lines = str(error.args[-1 if isinstance(error, OSError) else 0]).splitlines()
        # An error inside a config file comes with its traceback, which ends with what was wrong.
        if 'Traceback (most' in str(error):
            sys.exit(f'error: {lines[-1]}')
        unknown = 'the config has no field ' if isinstance(error, KeyError) else ''
        sys.exit(f'error: {unknown}{" ".join(lines)}')
    if flags.FLAGS['verbosity'].using_default_value:
        # absl's own choice, INFO, tells of every save; ERROR repeats our errors as tracebacks.
        flags.FLAGS.verbosity = logging.FATAL
    return rest


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
