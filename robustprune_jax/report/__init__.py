"""What runs came to: a table and a page of figures, made from the files of their workdirs only.

    python -m robustprune_jax.report DIR... [--out DIR]

`table(result)` is the text for a terminal; `write(workdir)` makes report/index.html, which opens
without a server or a network, beside it the table as CSV and LaTeX and the figures as PNG and SVG;
`combine(runs, folder)` makes the same of many runs. Needs neither jax nor the model.
"""

import os
import re
from pathlib import Path

from robustprune_jax.report import earlier, formats, page
from robustprune_jax.report.experiments import experiments
from robustprune_jax.report.results import tables
from robustprune_jax.report.run import Run, read
from robustprune_jax.runtime.files import write_atomically

__all__ = ['combine', 'read', 'table', 'write']


def table(result: dict) -> str:
    """Returns the networks of a run as text: a line for each network, and for each density how
    many percentage points each other method is above (+) or below LWM.

    result: what result.json holds; `networks` may be absent or incomplete.
    """
    networks = [earlier.entry(network) for network in result.get('networks', [])]
    return formats.text(tables({'': [{**result, 'networks': networks}]}))


def write(workdir: str | os.PathLike) -> Path:
    """Writes the report of one run into its folder report/; returns the path of the page.

    Parts of the run that are missing or unreadable are named in the page. Raises
    FileNotFoundError where there is no run at all.
    """
    return combine([read(workdir)], Path(workdir) / 'report')


def combine(runs: list[Run], folder: str | os.PathLike) -> Path:
    """Writes one report of many runs into `folder`; returns the path of the page.

    Runs that differ only in the seed become one experiment, with means and standard deviations;
    runs of other recipes stand beside it, the figures of each in a folder of its name.
    """
    # Only here: matplotlib takes half a second to import, and not every run writes a report.
    from robustprune_jax.report import figures

    found, notes = experiments(runs)
    compared = tables({experiment.title: experiment.results for experiment in found})
    all_drawn = [figures.draw(experiment) for experiment in found]
    for experiment, drawn in zip(found, all_drawn, strict=True):
        own = Path(folder) / re.sub(r'[^\w.]+', '_', experiment.title)
        for figure in drawn:
            write_atomically(own / f'{figure.name}.png', figure.png)
            write_atomically(own / f'{figure.name}.svg', figure.svg)
    path = Path(folder) / 'index.html'
    write_atomically(path.with_name('table.csv'), formats.as_csv(compared))
    write_atomically(path.with_name('table.tex'), formats.latex(compared))
    write_atomically(path, page.html(found, all_drawn, notes))
    return path
