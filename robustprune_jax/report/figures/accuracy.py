"""Accuracy against compression and against the radius, attacked and certified."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from robustprune_jax.config.parts import Part
from robustprune_jax.report import results
from robustprune_jax.report.columns import above_zero, columns
from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures.style import (
    GREY,
    INK,
    WIDTH,
    Drawn,
    drawn,
    grid,
    lines,
    percent,
    tones,
)
from robustprune_jax.report.formats import SIZES
from robustprune_jax.report.networks import label, part_of

# Of the points of an evaluation; bounds have the other one.
MARKS = {'pgd': 'o', 'standard': 'X', 'fast': 'X', 'smooth': 'v'}
PROVED = '^'


def by_compression(experiment: Experiment) -> Drawn | None:
    """Accuracy of the fine-tuned networks of each method against the compression ratio, from the
    pretrained network on, a panel for each column of the table that is not all 0; None where there
    is none, or fewer than two densities."""
    names = {part_of(n): n['name'] for x in experiment.results for n in x['networks']}
    tuned = {part: name for part, name in names.items() if part.phase == 'finetune'}
    ratios = sorted({1 / part.density for part in tuned})
    methods = {part.method for part in tuned}
    styles = lines(experiment.titles)
    shown = [c for c in columns(experiment.results) if above_zero(c)]
    if len(ratios) < 2 or not shown:
        return None
    ticks = [1, *ratios]
    figure, axes = grid(len(shown), across=3, height=2.9)
    for axis, column in zip(axes, shown, strict=True):
        before = results.cell(column, 'pretrain')
        if before:
            axis.axhline(before.mean, color=GREY, ls=(0, (1, 2)), lw=1)
        for method in filter(methods.__contains__, styles):
            own = sorted((1 / part.density, tuned[part]) for part in tuned if part.method == method)
            cells = [(r, results.cell(column, name)) for r, name in [(1, 'pretrain'), *own]]
            points = [(ratio, cell.mean, cell.std or 0) for ratio, cell in cells if cell]
            x, mean, std = zip(*points, strict=True) if points else ((), (), ())
            axis.errorbar(x, mean, std if any(std) else None, elinewidth=1, **styles[method])
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


def by_size(experiment: Experiment) -> Drawn | None:
    """Each robust accuracy of the fine-tuned networks against the bytes of their sparse files and
    against multiply-adds, a line for each method from the pretrained network on; None where no
    result says sizes, or where there is only one fine-tuned network."""
    networks = [n for result in experiment.results for n in result['networks'] if n.get('size')]
    shown = [c for c in columns(experiment.results) if above_zero(c) and c.title != 'clean']
    keys = [key for key in SIZES.values() if any(key in n['size'] for n in networks)]
    tuned = {n['name']: part_of(n).method for n in networks if part_of(n).phase == 'finetune'}
    if len(tuned) < 2 or not shown or not keys:
        return None
    sizes = {n['name']: n['size'] for n in reversed(networks)}
    figure, axes = grid(len(keys) * len(shown), across=len(keys), height=2.9)
    panels = [(column, title) for column in shown for title in SIZES if SIZES[title] in keys]
    for axis, (column, title) in zip(axes, panels, strict=True):
        for method, style in lines(experiment.titles).items():
            own = [name for name, of in tuned.items() if of == method]
            cells = {x: results.cell(column, x) for x in ['pretrain', *own] if x in sizes}
            points = sorted(
                (sizes[name][SIZES[title]], cell.mean, cell.std or 0)
                for name, cell in cells.items()
                if cell and SIZES[title] in sizes[name]
            )
            x, mean, std = zip(*points, strict=True) if own and points else ((), (), ())
            axis.errorbar(x, mean, std if any(std) else None, elinewidth=1, **style)
        axis.set(xscale='log', xlabel=title)
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.xaxis.set_minor_formatter(EngFormatter())
        axis.set_title(f'{column.title} accuracy (%)')
    axes[0].legend(loc='lower right')
    return drawn(
        'accuracy_by_size',
        'Accuracy against size',
        'Bytes of the weights that are not 0, with their places; multiply-adds of an image with '
        'those of them that have an effect. The rightmost point is the pretrained network.'
        + _over(experiment, 'bars'),
        figure,
    )


def certified(experiment: Experiment) -> Drawn | None:
    """Certified accuracy against the l_2 radius, of every network that smoothing certified."""
    parts = {part for run in experiment.runs for part in run.radii}
    if not parts:
        return None
    titles, tone = experiment.titles, tones(experiment.densities)
    order, styles = list(titles), lines(titles)

    def legend_order(part: Part):
        return order.index(part.method), -(part.density or 1), part.phase

    figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
    axis = figure.subplots()
    for part in sorted(parts, key=legend_order):
        radii = [run.radii[part] for run in experiment.runs if part in run.radii]
        # A step down where the certificate of an image ends, to 0 after the last.
        ends = np.unique([0, *(radius for seed in radii for radius in seed)])
        left = [100 * np.mean(seed[:, None] > ends, axis=0) for seed in radii]
        ls, what, style = '-', label(part, titles), {'color': INK}
        if part.method:
            ls, what = styles[part.method]['ls'], f'{what}, {percent(part.density)}'
            style = {'color': tone[part.density]}
        lw = 0.7 if part.phase == 'prune' else None
        mean = np.mean(left, axis=0)
        axis.step(ends, mean, where='post', ls=ls, lw=lw, label=what, **style)
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
        'Images whose class is right and certified at a radius; a kind of line for each method.'
        + _over(experiment, 'bands'),
        figure,
    )


def security(experiment: Experiment) -> Drawn | None:
    """Accuracy against eps, from the distances of the minimum-norm attack, a panel for each norm
    and density, and the accuracies of the other evaluations in that norm at theirs; None where no
    distances were measured."""
    found: dict[str, dict[Part, list]] = {}  # norm -> part -> distances and evaluations, by seed
    for run in experiment.runs:
        for network in run.result['networks']:
            part, robust = part_of(network), network.get('robust') or {}
            if part in run.distances and 'distances' in robust:
                seeds = found.setdefault(robust['distances']['norm'], {}).setdefault(part, [])
                seeds.append((run.distances[part], robust))
    panels = []
    for norm, parts in found.items():
        densities = sorted({p.density for p in parts if p.density}, reverse=True)
        panels += [(norm, density) for density in densities or [None]]
    if not panels:
        return None
    titles = experiment.titles
    figure, axes = grid(len(panels), across=3, height=2.9)
    for axis, (norm, density) in zip(axes, panels, strict=True):
        for part, seeds in found[norm].items():
            if part.density in (None, density):
                _security_curve(axis, part, norm, seeds, titles)
        of_norm = norm.removeprefix('l').replace('inf', '\\infty')
        axis.set_xlabel(f'$\\ell_{{{of_norm}}}$ size of the perturbation')
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.set_title('accuracy (%)' + (f', {percent(density)} kept' if density else ''))
    axes[0].legend()
    return drawn(
        'security',
        'Accuracy against the size of the perturbation',
        'Lines: what the minimum-norm attack leaves. Circles: PGD, crosses: the ensemble; upward '
        'triangles: proved by bounds, downward: by smoothing.'
        + (' Lines are means over seeds, points single seeds.' if len(experiment.runs) > 1 else ''),
        figure,
    )


def _security_curve(axis, part: Part, norm: str, seeds: list, titles: dict) -> None:
    """Draws the mean over seeds of a network, and where other evaluations see it."""
    style = {'color': GREY, 'ls': (0, (1, 2)), 'label': titles[None]}
    if part.method:
        every = lines(titles)[part.method]
        style = {key: every[key] for key in ('color', 'ls')} | {'label': label(part, titles)}
    ends = np.unique([0, *(x for distances, _ in seeds for x in distances if np.isfinite(x))])
    left = np.mean([[100 * np.mean(d > end) for end in ends] for d, _ in seeds], axis=0)
    lw = 0.7 if part.phase == 'prune' else None
    axis.step(ends, left, where='post', lw=lw, **style)
    for _, robust in seeds:
        for mark, eps, accuracy in _measured(robust, norm):
            axis.plot(eps, 100 * accuracy, mark, color=style['color'], ls='', clip_on=False)


def _measured(robust: dict, norm: str) -> list[tuple[str, float, float]]:
    """Returns marker, eps and accuracy of the evaluations in a norm, but of distances."""
    points = [
        (MARKS.get(name, PROVED), entry['eps'], entry['accuracy'])
        for name, entry in robust.items()
        if entry.get('norm') == norm and entry.get('accuracy') is not None
    ]
    certified = robust.get('smooth', {}).get('certified_accuracy', {}) if norm == 'l2' else {}
    return points + [(MARKS['smooth'], float(eps), x) for eps, x in certified.items()]


def _over(experiment: Experiment, marks: str) -> str:
    seeds = len(experiment.runs)
    if seeds == 1:
        return ''
    return f' Mean over {seeds} seeds; {marks}: ± sample standard deviation.'
