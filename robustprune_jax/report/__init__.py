"""What a run came to: a table and a page of figures, made from the files of its workdir only.

    python -m robustprune_jax.report DIR...

`table(result)` is the text for a terminal; `write(workdir)` makes report/index.html, which opens
without a server or a network, and its figures as PNG. Needs neither jax nor the model.
"""

import os
from pathlib import Path

from robustprune_jax.files import write_atomically
from robustprune_jax.report import figures, page
from robustprune_jax.report.results import table
from robustprune_jax.report.run import read

__all__ = ['table', 'write']


def write(workdir: str | os.PathLike) -> Path:
    """Writes report/index.html and report/*.png into `workdir`; returns the path of the page.

    Parts of the run that are missing or unreadable are named in the page. Raises
    FileNotFoundError where there is no run at all.
    """
    run = read(workdir)
    drawn = figures.draw(run)
    folder = run.workdir / 'report'
    for figure in drawn:
        write_atomically(folder / figure.file, figure.png)
    path = folder / 'index.html'
    write_atomically(path, page.html(run, drawn))
    return path
