"""The figures of a report, drawn off screen: histograms of weights, accuracies, training curves."""

import io
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustprune_jax.report import results
from robustprune_jax.report.run import Run

WIDTH = 9.6  # inches, of every figure, so that their text has one size on the page
PANELS = 12  # more histograms than this cannot be read side by side
# Okabe and Ito's palette, which every kind of colour vision tells apart.
GREY, ORANGE, BLUE = '#8a8a8a', '#d55e00', '#0072b2'
LWM = {'color': ORANGE, 'marker': 's', 'ls': '--', 'label': 'LWM'}
LEARNED = {'color': BLUE, 'marker': 'o', 'ls': '-', 'label': 'learned'}
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
    'legend.frameon': False,
    'figure.dpi': 100,
    'savefig.dpi': 180,
}


class Drawn(NamedTuple):
    """A figure: its file name, title, what it shows, and the PNG."""

    file: str
    title: str
    caption: str
    png: bytes


def draw(run: Run) -> list[Drawn]:
    """Returns the figures that the files of a run suffice for."""
    with matplotlib.rc_context(STYLE):
        kept = [histograms(run, density) for density in run.densities]
        figures = (accuracy_by_density(run), certified_by_radius(run), *kept, curves(run))
        return [figure for figure in figures if figure]


def certified_by_radius(run: Run) -> Drawn | None:
    """Certified accuracy against the l_2 radius, of every network that smoothing certified."""
    if not run.radii:
        return None
    tones = _tones(run.densities)
    figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
    axis = figure.subplots()
    for name, radii in run.radii.items():
        kind, _, density = name.partition('_')
        line = {'lwm': '--', 'pruned': ':'}.get(kind, '-')
        # A step down where the certificate of an image ends, to 0 after the last.
        ends = np.append(0, np.sort(radii[radii > 0]))
        remaining = 100 * np.arange(len(ends) - 1, -1, -1) / len(radii)
        tone = tones.get(density, '#333333')
        axis.step(ends, remaining, where='post', ls=line, color=tone, label=name)
    axis.set_xlabel('$\\ell_2$ radius (pixel units)')
    axis.set_ylabel('certified accuracy (%)')
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(ncols=2)
    return Drawn(
        'certified.png',
        'Certified accuracy by randomized smoothing',
        'Images whose class is right and certified at a radius. Solid: learned masks and the '
        'pretrained network; dashed: LWM.',
        _png(figure),
    )


def accuracy_by_density(run: Run) -> Drawn | None:
    """Accuracy of learned and LWM networks against density, a panel for each column of the table;
    None for fewer than two densities."""
    density_of = {n['name']: n.get('density') for n in run.result['networks']}
    lines = {
        kind: sorted(
            (density, name)
            for name, density in density_of.items()
            if density and name.partition('_')[0] == kind
        )
        for kind in ('lwm', 'hydra')
    }
    densities = sorted({density for points in lines.values() for density, _ in points})
    if len(densities) < 2:
        return None
    columns = results.columns(run.result)
    figure, axes = _grid(len(columns), across=3, height=2.9)
    for axis, column in zip(axes, columns, strict=True):
        if 'pretrain' in column.values:
            axis.axhline(
                100 * column.values['pretrain'],
                color=GREY,
                ls=(0, (4, 3)),
                lw=1,
                label='pretrained',
            )
        for kind, style in (('lwm', LWM), ('hydra', LEARNED)):
            points = [
                (d, 100 * column.values[name]) for d, name in lines[kind] if name in column.values
            ]
            if points:
                axis.plot(*zip(*points, strict=True), **style)
        axis.set(xscale='log', xlabel='weights kept (%)', title=f'{column.title} accuracy (%)')
        axis.set_xticks(densities, [f'{100 * d:g}' for d in densities])
        axis.minorticks_off()
        axis.invert_xaxis()
    axes[0].legend(loc='lower left')
    return Drawn(
        'accuracy_by_density.png',
        'Accuracy against density',
        'Fewer weights to the right. The grey line is the network before pruning.',
        _png(figure),
    )


def histograms(run: Run, density: str) -> Drawn | None:
    """Which weights the masks keep: their magnitudes before pruning, a panel for each layer.

    Before pruning, because fine-tuning moves what is kept and would blur the comparison.
    """
    before = run.weights.get('pretrain')
    kept = {kind: run.weights.get(f'{kind}_{density}') for kind in ('lwm', 'hydra')}
    kept = {kind: layers for kind, layers in kept.items() if layers}
    if not before or not kept:
        return None
    layers = [
        name
        for name, kernel in before.items()
        if all(name in other and other[name].shape == kernel.shape for other in kept.values())
    ]
    if not layers:
        return None
    shown = layers
    if len(layers) > PANELS:
        shown = [layers[i] for i in np.linspace(0, len(layers) - 1, PANELS).round().astype(int)]
    figure, axes = _grid(len(shown), across=4, height=2)
    for axis, layer in zip(axes, shown, strict=True):
        magnitudes = np.abs(before[layer]).ravel()
        # Few bins for small layers, whose histograms would be combs.
        bins = np.linspace(0, magnitudes.max() or 1, 16 if magnitudes.size < 2000 else 31)
        axis.hist(magnitudes, bins, color='#d0d0d0', label='pretrained (all)')
        for kind, style in (('lwm', LWM), ('hydra', LEARNED)):
            if kind in kept:
                mask = kept[kind][layer].ravel() != 0
                axis.hist(
                    magnitudes[mask],
                    bins,
                    histtype='step',
                    lw=1.3,
                    color=style['color'],
                    ls=style['ls'],
                    label=f'kept by {style["label"]} mask',
                )
        axis.set(yscale='log', title=f'{layer}  ({before[layer].size:,})', xlim=(0, bins[-1]))
        axis.set_ylim(bottom=0.7)
    figure.supxlabel('magnitude in the pretrained network', fontsize=10)
    figure.supylabel('weights', fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=3)
    some = f' {len(shown)} of {len(layers)} layers, evenly spaced.' if shown != layers else ''
    return Drawn(
        f'weights_{density}.png',
        f'Weights kept at density {density}',
        'How large the kept weights were in the pretrained network, layer by layer (size in '
        f'brackets). LWM keeps the largest by definition.{some}',
        _png(figure),
    )


CURVES = (  # title, unit, key while training, key on the validation part
    ('training loss', 1, 'loss', None),
    ('clean accuracy (%)', 100, 'accuracy', 'validation_accuracy'),
    ('robust accuracy (%)', 100, 'robust_accuracy', 'validation_robust_accuracy'),
    ('verified accuracy (%)', 100, 'verified_accuracy', 'validation_verified_accuracy'),
    ('accuracy under noise (%)', 100, 'noisy_accuracy', None),
    ('estimated radius', 1, None, 'validation_radius'),
)
PHASE_TITLES = {
    'pretrain': 'pretraining',
    'prune': 'pruning',
    'finetune': 'fine-tuning',
    'lwm': 'LWM fine-tuning',
}


def curves(run: Run) -> Drawn | None:
    """Loss and accuracies of every phase against the epoch, a colour for each density."""
    lines_of = run.metrics
    logged = {key for lines in lines_of.values() for line in lines for key in line}
    rows = [row for row in CURVES if {row[2], row[3]} & logged]
    phases = [p for p in PHASE_TITLES if any(k.split('/')[-1] == p for k in lines_of)]
    if not rows:
        return None
    colour = _tones(run.densities)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.8 * len(rows)), layout='constrained')
    axes = figure.subplots(len(rows), len(phases), squeeze=False, sharex='col', sharey='row')
    for part, lines in lines_of.items():
        folder, _, phase = part.rpartition('/')
        tone = colour.get(folder.removeprefix('density_'), '#333333')
        for axis, (_, unit, trained, validated) in zip(
            axes[:, phases.index(phase)], rows, strict=True
        ):
            axis.plot(*_series(lines, trained, unit), color=tone, lw=0.9, alpha=0.55)
            axis.plot(*_series(lines, validated, unit), color=tone, marker='o', ms=3)
    for axis, phase in zip(axes[0], phases, strict=True):
        axis.set_title(PHASE_TITLES[phase])
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row[0])
    for axis in axes[-1]:
        axis.set_xlabel('epoch')
        axis.set_xlim(left=0)
    handles = [
        *(Line2D([], [], color=colour[d], label=f'density {d}') for d in run.densities),
        Line2D([], [], color='#333333', lw=0.9, alpha=0.55, label='training batches'),
        Line2D([], [], color='#333333', marker='o', ms=3, label='validation'),
    ]
    figure.legend(handles=handles, loc='outside upper center', ncols=min(len(handles), 7))
    return Drawn(
        'training.png',
        'Training',
        'Thin lines: training batches, under the attack of training where accuracy is called '
        'robust. Dots: the validation part of the training split.',
        _png(figure),
    )


def _tones(densities: list[str]) -> dict[str, np.ndarray]:
    """Returns a colour for each density."""
    tones = matplotlib.colormaps['plasma'](np.linspace(0.05, 0.8, max(len(densities), 1)))
    return dict(zip(densities, tones, strict=False))


def _grid(panels: int, across: int, height: float) -> tuple[Figure, list]:
    """Returns a figure with so many axes, in rows of `across`; height: of a row, in inches."""
    across = min(across, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(WIDTH, 0.5 + height * down), layout='constrained')
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(panels)]


def _series(lines: list[dict], key: str, scale: float) -> tuple[list, list]:
    """Returns epochs and values of the lines that have both."""
    points = [
        (x['epoch'], scale * x[key]) for x in lines if None not in (x.get('epoch'), x.get(key))
    ]
    return [x for x, _ in points], [y for _, y in points]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()
