"""The figures of a report, drawn off screen, as PNG and SVG."""

import matplotlib

from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures import accuracy, training, weights
from robustprune_jax.report.figures.style import STYLE, Drawn

__all__ = ['Drawn', 'draw']


def draw(experiment: Experiment) -> list[Drawn]:
    """Returns the figures that the files of an experiment suffice for."""
    with matplotlib.rc_context(STYLE):
        histograms = [weights.histograms(experiment, d) for d in experiment.densities]
        figures = (
            accuracy.by_compression(experiment),
            accuracy.by_size(experiment),
            accuracy.certified(experiment),
            accuracy.security(experiment),
            weights.per_layer(experiment),
            *histograms,
            training.curves(experiment),
        )
        return [figure for figure in figures if figure]
