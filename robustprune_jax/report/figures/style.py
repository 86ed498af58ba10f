"""What all figures share: type, colours, panels, files."""

import io
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robustprune_jax.report.page import Drawn

WIDTH = 9.6  # inches, of every figure, so that their text has one size on the page
INK = '#333333'
# Okabe and Ito's palette, which every kind of colour vision tells apart.
GREY = '#8a8a8a'
LINES = {
    'hydra': {'color': '#0072b2', 'marker': 'o', 'ls': '-'},
    'lwm': {'color': '#d55e00', 'marker': 's', 'ls': '--'},
}
# Of other methods; one more marker than colours, so that they come together in ever new pairs.
COLOURS = ('#009e73', '#cc79a7', '#56b4e9', '#e69f00')
MARKERS = ('^', 'D', 'v', 'P', 'X')
DASHES = ('-.', ':', (0, (5, 1, 1, 1, 1, 1)))
STYLE = {
    'font.family': 'STIXGeneral',
    'mathtext.fontset': 'stix',
    'font.size': 10,
    'axes.titlesize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'xtick.major.width': 0.6,
    'ytick.major.width': 0.6,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#e4e4e4',
    'grid.linewidth': 0.5,
    'lines.linewidth': 1.4,
    'lines.markersize': 4,
    'errorbar.capsize': 2.5,
    'legend.frameon': False,
    'figure.dpi': 180,
    'svg.hashsalt': 'report',  # the same files make the same bytes
}


def drawn(name: str, title: str, caption: str, figure: Figure) -> Drawn:
    """Returns a figure in both formats."""
    png = _saved(figure, 'png')
    figure.set_layout_engine('none')  # it is laid out; doing so again takes half of the time
    return Drawn(name, title, caption, png, _saved(figure, 'svg'))


def lines(titles: dict[str | None, str]) -> dict[str, dict]:
    """Returns method -> how its lines are drawn; titles: method -> title, their label."""
    others = (
        {'color': colour, 'marker': marker, 'ls': dashes}
        for colour, marker, dashes in zip(
            cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False
        )
    )
    return {
        method: {**(LINES.get(method) or next(others)), 'label': title}
        for method, title in titles.items()
        if method
    }


def tones(densities: list[float]) -> dict[float, np.ndarray]:
    """Returns a colour for each density."""
    colours = matplotlib.colormaps['plasma'](np.linspace(0.05, 0.8, max(len(densities), 1)))
    return dict(zip(densities, colours, strict=False))


def grid(panels: int, across: int, height: float) -> tuple[Figure, list]:
    """Returns a figure with so many axes, in rows of `across`; height: of a row, in inches."""
    across = min(across, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(WIDTH, 0.5 + height * down), layout='constrained')
    figure.get_layout_engine().set(h_pad=0.08)
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(panels)]


def percent(density: float) -> str:
    """Returns a kept fraction as a percentage: 0.1 is '10 %'."""
    return f'{100 * density:g} %'


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Not figure.savefig, which draws everything twice.
    if kind == 'png':
        FigureCanvasAgg(figure).print_png(buffer)
    else:
        FigureCanvasSVG(figure).print_svg(buffer, metadata={'Date': None})
    return buffer.getvalue()
