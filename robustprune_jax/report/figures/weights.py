"""Which weights the masks keep: how large they were, and where LWM and learned masks agree."""

import numpy as np
from matplotlib.lines import Line2D

from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures.style import (
    INK,
    LEARNED,
    LWM,
    Drawn,
    drawn,
    grid,
    percent,
    tones,
)
from robustprune_jax.report.run import Run

PANELS = 12  # more layers than this cannot be read side by side
KINDS = (('lwm', LWM), ('hydra', LEARNED))


def histograms(experiment: Experiment, density: str) -> Drawn | None:
    """Magnitudes, before pruning, of the weights that each mask keeps, a panel for each layer, of
    the first run that has them.

    Before pruning, because fine-tuning moves what is kept and would blur the comparison.
    """
    run = next((run for run in experiment.runs if _layers(run, density)), None)
    if run is None:
        return None
    before, kept, layers = run.weights['pretrain'], _kept(run, density), _layers(run, density)
    shown = layers
    if len(layers) > PANELS:
        shown = [layers[i] for i in np.linspace(0, len(layers) - 1, PANELS).round().astype(int)]
    figure, axes = grid(len(shown), across=4, height=2)
    for axis, layer in zip(axes, shown, strict=True):
        magnitudes = np.abs(before[layer]).ravel()
        # Few bins for small layers, whose histograms would be combs.
        bins = np.linspace(0, magnitudes.max() or 1, 16 if magnitudes.size < 2000 else 31)
        axis.hist(magnitudes, bins, color='#d0d0d0', label='pretrained (all)')
        for kind, style in KINDS:
            if kind in kept:
                axis.hist(
                    magnitudes[kept[kind][layer].ravel() != 0],
                    bins,
                    histtype='step',
                    lw=1.3,
                    color=style['color'],
                    ls=style['ls'],
                    label=f'kept by {style["label"]} mask',
                )
        axis.set(yscale='log', title=f'layer {layer}  ({before[layer].size:,})', xlim=(0, bins[-1]))
        axis.set_ylim(bottom=0.7)
    figure.supxlabel('magnitude in the pretrained network', fontsize=10)
    figure.supylabel('weights', fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=3)
    some = f' {len(shown)} of {len(layers)} layers, evenly spaced.' if shown != layers else ''
    seed = f' Seed {run.result.get("seed")}.' if len(experiment.runs) > 1 else ''
    return drawn(
        f'weights_{density}',
        f'Which weights stay at {percent(density)}',
        'How large the kept weights were in the pretrained network, layer by layer (size in '
        f'brackets). LWM keeps the largest by definition.{some}{seed}',
        figure,
    )


def per_layer(experiment: Experiment) -> Drawn | None:
    """The kept fraction of each layer, and how much of the learned mask LWM keeps too; means over
    the runs that have a network."""
    pairs = [(d, _kept(run, d)) for d in experiment.densities for run in experiment.runs]
    networks = [kernels for _, kept in pairs for kernels in kept.values()]
    layers = _common(networks)
    found = {}  # kind, density -> an array [runs, layers] of percentages
    for density, kept in pairs:
        masks = {kind: [kernels[x] != 0 for x in layers] for kind, kernels in kept.items()}
        for kind, mask in masks.items():
            found.setdefault((kind, density), []).append([100 * layer.mean() for layer in mask])
        if len(masks) == 2:
            both = zip(masks['lwm'], masks['hydra'], strict=True)
            shares = [100 * (a & b).sum() / max(b.sum(), 1) for a, b in both]
            found.setdefault(('both', density), []).append(shares)
    if not layers:
        return None
    tone, place = tones(experiment.densities), np.arange(len(layers))
    figure, (left, right) = grid(2, across=2, height=2.9)
    for (kind, density), shares in found.items():
        axis = right if kind == 'both' else left
        # Side by side, so that no error bar hides another.
        shift = 0.08 * (experiment.densities.index(density) if kind == 'both' else 0)
        marker = {'lwm': 's', 'hydra': 'o', 'both': 'o'}[kind]
        std = np.std(shares, axis=0, ddof=1) if len(shares) > 1 else None
        axis.errorbar(
            place + shift,
            np.mean(shares, axis=0),
            std if kind == 'both' else None,
            color=tone[density],
            marker=marker,
            ms=9 if kind == 'lwm' else 4,
            mfc='none' if kind == 'lwm' else None,
            ls='--' if kind == 'lwm' else '-',
            lw=1,
        )
    shares = [100 * float(density) for density in experiment.densities]
    left.set(yscale='log', title='weights kept (%)', ylim=(min(shares) / 2, 2 * max(shares)))
    left.set_yticks(shares, [f'{share:g}' for share in shares])
    left.minorticks_off()
    right.set(ylim=(0, 105), title='of the learned mask, LWM keeps too (%)')
    for axis in (left, right):
        axis.set_xlabel('layer, from input to output')
        if len(layers) <= PANELS:
            axis.set_xticks(place, layers, rotation=30 if max(map(len, layers)) > 6 else 0)
    handles = [
        Line2D([], [], color=INK, marker='s', ms=9, mfc='none', lw=1, ls='--', label='LWM'),
        Line2D([], [], color=INK, marker='o', lw=1, label='learned'),
        *(Line2D([], [], color=tone[d], label=percent(d)) for d in experiment.densities),
    ]
    figure.legend(handles=handles, loc='outside upper center', ncols=min(len(handles), 7))
    return drawn(
        'layers',
        'Weights kept in each layer',
        'Left: the share of each layer that is not 0 in the exported networks. Right: how far the '
        'two masks agree; masks drawn at random would agree in as much as they keep.',
        figure,
    )


def _kept(run: Run, density: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns kind -> {layer: kernel} of the networks at a density."""
    kept = {kind: run.weights.get(f'{kind}_{density}') for kind, _ in KINDS}
    return {kind: layers for kind, layers in kept.items() if layers}


def _layers(run: Run, density: str) -> list[str]:
    """Returns the layers in which the pretrained network and those at a density can be compared."""
    kept = _kept(run, density).values()
    return _common([run.weights.get('pretrain', {}), *kept]) if kept else []


def _common(networks: list[dict[str, np.ndarray]]) -> list[str]:
    """Returns the layers that all networks have, in one shape."""
    return [
        name
        for name, kernel in (networks[0] if networks else {}).items()
        if all(name in other and other[name].shape == kernel.shape for other in networks)
    ]
