"""python -m robustprune_jax.report DIR... [--out DIR]: prints the table of runs, writes their
pages; seeds of one recipe become one line with mean and standard deviation."""

import argparse
import sys
from pathlib import Path

from robustprune_jax import report
from robustprune_jax.report import formats
from robustprune_jax.report.experiments import experiments, fields_apart
from robustprune_jax.report.results import tables


def main(arguments: list[str] | None = None) -> int:
    """Reports on every workdir named; returns 1 if one holds no run or cannot be written to."""
    parser = argparse.ArgumentParser(prog='python -m robustprune_jax.report', description=__doc__)
    parser.add_argument('workdir', nargs='+', metavar='DIR', help='workdir of a run')
    parser.add_argument('--out', metavar='DIR', help="one page of all, instead of each run's own")
    options = parser.parse_args(arguments)
    runs, pages, status = [], [], 0
    for workdir in dict.fromkeys(options.workdir):
        try:
            runs.append(report.read(workdir))
            if not options.out:
                pages.append(report.combine(runs[-1:], Path(workdir) / 'report'))
        except OSError as error:
            print(f'error: {error}', file=sys.stderr)
            status = 1
    if not runs:
        return status
    if options.out:
        pages.append(report.combine(runs, options.out))
    found, notes = experiments(runs)
    print(formats.text(tables({e.title: e.results for e in found})), *notes, sep='\n')
    if apart := fields_apart(found):
        print('Where the recipes differ:', ' | '.join(experiment.title for experiment in found))
    for field, values in apart.items():
        print(f'  {field}:', ' | '.join(map(repr, values)))
    print(*pages, sep='\n')
    return status


if __name__ == '__main__':
    sys.exit(main())
