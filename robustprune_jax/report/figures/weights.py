"""Which weights the masks keep: how large they were, and where other masks agree with LWM's."""

import numpy as np
from matplotlib.lines import Line2D

from robustprune_jax.config.parts import Part, exact
from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures.style import INK, Drawn, drawn, grid, lines, percent, tones
from robustprune_jax.report.networks import BASELINE
from robustprune_jax.report.run import Run

PANELS = 12  # more layers than this cannot be read side by side


def histograms(experiment: Experiment, density: float) -> Drawn | None:
    """Magnitudes, before pruning, of the weights that each mask keeps, a panel for each layer, of
    the first run that has them.

    Before pruning, because fine-tuning moves what is kept and would blur the comparison.
    """
    run = next((run for run in experiment.runs if _layers(run, density)), None)
    if run is None:
        return None
    before, kept = run.weights[Part('pretrain')], _kept(run, density)
    styles, layers = lines(experiment.titles), _layers(run, density)
    shown = layers
    if len(layers) > PANELS:
        shown = [layers[i] for i in np.linspace(0, len(layers) - 1, PANELS).round().astype(int)]
    figure, axes = grid(len(shown), across=4, height=2)
    for axis, layer in zip(axes, shown, strict=True):
        magnitudes = np.abs(before[layer]).ravel()
        # Few bins for small layers, whose histograms would be combs.
        bins = np.linspace(0, magnitudes.max() or 1, 16 if magnitudes.size < 2000 else 31)
        axis.hist(magnitudes, bins, color='#d0d0d0', label='pretrained (all)')
        for method in filter(kept.get, styles):
            style = styles[method]
            axis.hist(
                magnitudes[kept[method][layer].ravel() != 0],
                bins,
                histtype='step',
                lw=1.3,
                color=style['color'],
                ls=style['ls'],
                label=f'kept by {style["label"]}',
            )
        axis.set(yscale='log', title=f'layer {layer}  ({before[layer].size:,})', xlim=(0, bins[-1]))
        axis.set_ylim(bottom=0.7)
    figure.supxlabel('magnitude in the pretrained network', fontsize=10)
    figure.supylabel('weights', fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4)
    some = f' {len(shown)} of {len(layers)} layers, evenly spaced.' if shown != layers else ''
    seed = f' Seed {run.result.get("seed")}.' if len(experiment.runs) > 1 else ''
    return drawn(
        f'weights_{exact(density)}',
        f'Which weights stay at {percent(density)}',
        'How large the kept weights were in the pretrained network, layer by layer (size in '
        f'brackets). LWM keeps the largest by definition.{some}{seed}',
        figure,
    )


def per_layer(experiment: Experiment) -> Drawn | None:
    """The kept fraction of each layer under each method, and how much of the other masks LWM keeps
    too; means over the runs that have a network."""
    layers, kept, agreement = _shares(experiment)
    if not layers:
        return None
    tone, styles = tones(experiment.densities), lines(experiment.titles)
    styles.get(BASELINE, {}).update(ms=9, mfc='none')  # around the others
    methods = list(dict.fromkeys(method for method, _ in kept))
    figure, axes = grid(2 if agreement else 1, across=2, height=2.9)
    for axis, shares in zip(axes, (kept, agreement), strict=False):
        # Side by side, so that no error bar hides another; densities are apart on the left.
        beside = methods if shares is kept else list(shares)
        step = min(0.08, 0.6 / len(beside))
        for (method, density), percentages in shares.items():
            side = beside.index(method if shares is kept else (method, density))
            place = np.arange(len(layers)) + step * (side - (len(beside) - 1) / 2)
            std = np.std(percentages, axis=0, ddof=min(len(percentages) - 1, 1))
            bars = std if std.any() else None
            mean = np.mean(percentages, axis=0)
            axis.errorbar(place, mean, bars, **{**styles[method], 'color': tone[density], 'lw': 1})
        axis.set_xlabel('layer, from input to output')
        if len(layers) <= PANELS:
            rotation = 30 if max(map(len, layers)) > 6 else 0
            axis.set_xticks(range(len(layers)), layers, rotation=rotation)
    percentages = [100 * density for density in experiment.densities]
    found = [*percentages, *np.ravel([x for shares in kept.values() for x in shares])]
    limits = min(x for x in found if x > 0) / 2, 2 * max(found)
    axes[0].set(yscale='log', title='weights kept (%)', ylim=limits)
    axes[0].set_yticks(percentages, [f'{share:g}' for share in percentages])
    axes[0].minorticks_off()
    if agreement:
        axes[1].set(ylim=(0, 105), title='of another mask, LWM keeps too (%)')
    handles = [
        *(Line2D([], [], **{**styles[method], 'color': INK, 'lw': 1}) for method in methods),
        *(Line2D([], [], color=tone[d], label=percent(d)) for d in experiment.densities),
    ]
    figure.legend(handles=handles, loc='outside upper center', ncols=min(len(handles), 7))
    right = (
        ' Right: how far the other masks agree with that of LWM; masks drawn at random would agree '
        'in as much as they keep.'
    )
    return drawn(
        'layers',
        'Weights kept in each layer',
        'The share of each layer that is not 0 in the exported networks.' + right * bool(agreement),
        figure,
    )


def _shares(experiment: Experiment) -> tuple[list[str], dict, dict]:
    """Returns the layers that all fine-tuned networks have, and by (method, density) the kept
    percentages and those of the mask that LWM keeps too, arrays [runs, layers]."""
    pairs = [(d, _kept(run, d)) for d in experiment.densities for run in experiment.runs]
    layers = _common([kernels for _, kept in pairs for kernels in kept.values()])
    shares, agreement = {}, {}
    for density, kept in pairs:
        masks = {method: [kernels[x] != 0 for x in layers] for method, kernels in kept.items()}
        for method in filter(masks.get, experiment.titles):
            mask = masks[method]
            shares.setdefault((method, density), []).append([100 * x.mean() for x in mask])
            if method != BASELINE and BASELINE in masks:
                both = zip(masks[BASELINE], mask, strict=True)
                agreed = [100 * (a & b).sum() / max(b.sum(), 1) for a, b in both]
                agreement.setdefault((method, density), []).append(agreed)
    return layers, shares, agreement


def _kept(run: Run, density: float) -> dict[str, dict[str, np.ndarray]]:
    """Returns method -> {layer: kernel} of the fine-tuned networks at a density."""
    return {
        part.method: layers
        for part, layers in run.weights.items()
        if part.phase == 'finetune' and part.density == density
    }


def _layers(run: Run, density: float) -> list[str]:
    """Returns the layers in which the pretrained network and those at a density can be compared."""
    kept = _kept(run, density).values()
    return _common([run.weights.get(Part('pretrain'), {}), *kept]) if kept else []


def _common(networks: list[dict[str, np.ndarray]]) -> list[str]:
    """Returns the layers that all networks have, in one shape."""
    return [
        name
        for name, kernel in (networks[0] if networks else {}).items()
        if all(name in other and other[name].shape == kernel.shape for other in networks)
    ]
