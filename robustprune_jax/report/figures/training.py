"""Training curves."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures.style import INK, WIDTH, Drawn, drawn, percent, tones

CURVES = (  # title, unit, key while training, key on the validation part
    ('training loss', 1, 'loss', None),
    ('clean accuracy (%)', 100, 'accuracy', 'validation_accuracy'),
    ('robust accuracy (%)', 100, 'robust_accuracy', 'validation_robust_accuracy'),
    ('verified accuracy (%)', 100, 'verified_accuracy', 'validation_verified_accuracy'),
    ('accuracy under noise (%)', 100, 'noisy_accuracy', None),
    ('estimated radius', 1, None, 'validation_radius'),
)
PHASES = {'pretrain': 'pretraining', 'prune': 'pruning', 'finetune': 'fine-tuning'}


def curves(experiment: Experiment) -> Drawn | None:
    """Loss and accuracies of every phase of every method against the epoch, a colour for each
    density, a line for each seed."""
    found = [item for run in experiment.runs for item in run.metrics.items()]
    logged = {key for _, lines in found for line in lines for key in line}
    rows = [row for row in CURVES if {row[2], row[3]} & logged]
    trained = {(part.method, part.phase) for part, _ in found}
    titles = {
        (method, phase): f'{title}\n{what}' if method else what
        for method, title in experiment.titles.items()
        for phase, what in PHASES.items()
        if (method, phase) in trained
    }
    if not rows:
        return None
    colour = tones(experiment.densities)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.8 * len(rows)), layout='constrained')
    axes = figure.subplots(len(rows), len(titles), squeeze=False, sharex='col', sharey='row')
    for part, lines in found:
        tone = colour.get(part.density, INK)
        column = axes[:, list(titles).index((part.method, part.phase))]
        for axis, (_, unit, trained, validated) in zip(column, rows, strict=True):
            axis.plot(*_series(lines, trained, unit), color=tone, lw=0.9, alpha=0.55)
            axis.plot(*_series(lines, validated, unit), color=tone, marker='o', ms=2.5, lw=1.2)
    for axis, title in zip(axes[0], titles.values(), strict=True):
        axis.set_title(title)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row[0])
    for axis in axes[-1]:
        axis.set_xlabel('epoch')
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [
        *(Line2D([], [], color=colour[d], label=percent(d)) for d in experiment.densities),
        Line2D([], [], color=INK, lw=0.9, alpha=0.55, label='training batches'),
        Line2D([], [], color=INK, marker='o', ms=2.5, lw=1.2, label='validation'),
    ]
    figure.legend(handles=handles, loc='outside upper center', ncols=min(len(handles), 7))
    seeds = ' A line for each seed.' if len(experiment.runs) > 1 else ''
    return drawn(
        'training',
        'Training',
        'Thin lines: training batches, under the attack of training where accuracy is called '
        f'robust. Dots: the validation part of the training split.{seeds}',
        figure,
    )


def _series(lines: list[dict], key: str, scale: float) -> tuple[list, list]:
    """Returns epochs and values of the lines that have both, as numbers."""
    pairs = [(line.get('epoch'), line.get(key)) for line in lines]
    points = [pair for pair in pairs if all(isinstance(value, int | float) for value in pair)]
    return [epoch for epoch, _ in points], [scale * value for _, value in points]
