"""Accuracy against compression, and certified accuracy against the radius."""

import numpy as np
from matplotlib.figure import Figure

from robustprune_jax.report import results
from robustprune_jax.report.columns import above_zero, columns
from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures.style import (
    GREY,
    INK,
    LEARNED,
    LWM,
    WIDTH,
    Drawn,
    drawn,
    grid,
    percent,
    tones,
)


def by_compression(experiment: Experiment) -> Drawn | None:
    """Accuracy of learned and LWM networks against the compression ratio, from the pretrained
    network on, a panel for each column of the table that is not all 0; None where there is none,
    or fewer than two densities."""
    density_of = {n['name']: n.get('density') for x in experiment.results for n in x['networks']}
    lines = {
        kind: sorted(
            (1 / density, name)
            for name, density in density_of.items()
            if density and name.partition('_')[0] == kind
        )
        for kind in ('lwm', 'hydra')
    }
    ratios = sorted({ratio for points in lines.values() for ratio, _ in points})
    shown = [c for c in columns(experiment.results) if above_zero(c)]
    if len(ratios) < 2 or not shown:
        return None
    ticks = [1, *ratios]
    figure, axes = grid(len(shown), across=3, height=2.9)
    for axis, column in zip(axes, shown, strict=True):
        before = results.cell(column, 'pretrain')
        if before:
            axis.axhline(before.mean, color=GREY, ls=(0, (1, 2)), lw=1)
        for kind, style in (('lwm', LWM), ('hydra', LEARNED)):
            cells = [(r, results.cell(column, name)) for r, name in [(1, 'pretrain'), *lines[kind]]]
            points = [(ratio, cell.mean, cell.std or 0) for ratio, cell in cells if cell]
            x, mean, std = zip(*points, strict=True) if points else ((), (), ())
            axis.errorbar(x, mean, std if any(std) else None, elinewidth=1, **style)
        axis.set(xscale='log', xlabel='compression ratio (weights kept)')
        axis.set_title(f'{column.title} accuracy (%)')
        axis.set_xticks(ticks, [f'{ratio:.3g}×\n{percent(round(1 / ratio, 9))}' for ratio in ticks])
        axis.minorticks_off()
    axes[0].legend(loc='lower left')
    return drawn(
        'accuracy_by_compression',
        'Accuracy against compression',
        'The pretrained network stands at 1×, and the dotted line at its accuracy.'
        + _over(experiment, 'bars'),
        figure,
    )


def certified(experiment: Experiment) -> Drawn | None:
    """Certified accuracy against the l_2 radius, of every network that smoothing certified."""
    names = dict.fromkeys(name for run in experiment.runs for name in run.radii)
    if not names:
        return None
    tone = tones(experiment.densities)
    figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
    axis = figure.subplots()
    for name in sorted(names, key=_legend_order):
        kind, _, density = name.partition('_')
        radii = [run.radii[name] for run in experiment.runs if name in run.radii]
        # A step down where the certificate of an image ends, to 0 after the last.
        ends = np.unique([0, *(radius for seed in radii for radius in seed)])
        left = [100 * np.mean(seed[:, None] > ends, axis=0) for seed in radii]
        line = {'lwm': '--', 'pruned': ':'}.get(kind, '-')
        what = {'lwm': 'LWM', 'hydra': 'learned', 'pretrain': 'pretrained'}.get(kind, kind)
        style = {'color': tone.get(density, INK)}
        label = f'{what}, {percent(density)}' if density in tone else what
        mean = np.mean(left, axis=0)
        axis.step(ends, mean, where='post', ls=line, label=label, **style)
        if len(left) > 1:
            std = np.std(left, axis=0, ddof=1)
            axis.fill_between(ends, mean - std, mean + std, step='post', alpha=0.15, lw=0, **style)
    axis.set_xlabel('$\\ell_2$ radius (pixel units)')
    axis.set_ylabel('certified accuracy (%)')
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(ncols=2)
    return drawn(
        'certified',
        'Certified accuracy by randomized smoothing',
        'Images whose class is right and certified at a radius. Solid: learned masks and the '
        'pretrained network; dashed: LWM.' + _over(experiment, 'bands'),
        figure,
    )


def _legend_order(name: str):
    """Sorts the pretrained network first, then LWM and then learned ones, densest first."""
    kind, _, density = name.partition('_')
    return results.ORDER.index(kind) if kind in results.ORDER else 9, -float(density or 1)


def _over(experiment: Experiment, marks: str) -> str:
    seeds = len(experiment.runs)
    if seeds == 1:
        return ''
    return f' Mean over {seeds} seeds; {marks}: ± sample standard deviation.'
