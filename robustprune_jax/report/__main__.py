"""python -m robustprune_jax.report DIR...: prints each run's table and writes its page."""

import argparse
import sys
from pathlib import Path

from robustprune_jax import report
from robustprune_jax.report.run import read_result


def main(arguments: list[str] | None = None) -> int:
    """Reports on every workdir named; returns 1 if one holds no run or cannot be written to."""
    parser = argparse.ArgumentParser(prog='python -m robustprune_jax.report', description=__doc__)
    parser.add_argument('workdir', nargs='+', metavar='DIR', help='workdir of a run')
    status = 0
    for workdir in parser.parse_args(arguments).workdir:
        try:
            path = report.write(workdir)
        except OSError as error:
            print(f'error: {error}', file=sys.stderr)
            status = 1
            continue
        print(f'{report.table(read_result(Path(workdir), []))}\n{path}')
    return status


if __name__ == '__main__':
    sys.exit(main())
