"""The comparison of networks over seeds and recipes, as tables that any output format can print."""

import math
from typing import NamedTuple

import numpy as np

from robustprune_jax.report.columns import Column, columns

ORDER = ('pretrain', 'lwm', 'pruned', 'hydra')


class Cell(NamedTuple):
    """A percentage, or a difference in percentage points: its mean over the seeds, its sample
    standard deviation (divisor n - 1; None for one seed), and the number n of seeds."""

    mean: float
    std: float | None
    n: int


class Row(NamedTuple):
    """A network, or (delta=True) learned minus LWM at one density, seed by seed.

    cells: None where nothing was measured; best: whether a cell is the better one of the pair
    learned and LWM, over the seeds that have both.
    """

    name: str
    density: float | None
    kept: int | None
    prunable: int | None
    cells: list[Cell | None]
    best: list[bool]
    delta: bool = False


class Block(NamedTuple):
    """The rows of one recipe, and the seed of each of its results."""

    title: str
    seeds: list
    rows: list[Row]


class Table(NamedTuple):
    """Recipes that were measured in the same way: the titles of their columns, and how to read
    the numbers, in sentences."""

    titles: list[str]
    blocks: list[Block]
    notes: list[str]


def tables(experiments: dict[str, list[dict]], steps: bool = False) -> list[Table]:
    """Returns a table for each set of evaluations.

    experiments: title -> results of one recipe (what their result.json hold), one for each seed.
    steps: instead, accuracies after each attack of the standard ensemble, where there are any.
    """
    alike: dict[tuple, dict[str, list[Column]]] = {}
    for title, results in experiments.items():
        found = columns(results, steps)
        if found if steps else any(result['networks'] for result in results):
            measured = tuple((column.title, column.settings) for column in found)
            alike.setdefault(measured, {})[title] = found
    return [
        Table(
            _distinct(measured),
            [_block(title, experiments[title], shown) for title, shown in found.items()],
            _notes(experiments, found),
        )
        for measured, found in alike.items()
    ]


def _block(title: str, results: list[dict], shown: list[Column]) -> Block:
    return Block(title, [result.get('seed') for result in results], rows(results, shown))


def rows(results: list[dict], shown: list[Column]) -> list[Row]:
    """Returns the networks from dense to sparse, LWM before learned, then their difference."""
    networks = {x['name']: x for result in reversed(results) for x in result['networks']}
    table_rows = []
    for name, network in sorted(networks.items(), key=lambda item: _rank(item[1])):
        kind, _, density = name.partition('_')
        rival = {'hydra': f'lwm_{density}', 'lwm': f'hydra_{density}'}.get(kind)
        cells = [cell(column, name) for column in shown]
        deltas = [cell(column, name, rival) if rival else None for column in shown]
        # An equal result is highlighted in neither row; the bound is for rounding of means.
        best = [delta is not None and delta.mean > 1e-9 for delta in deltas]
        counts = (network.get('density'), network.get('kept'), network.get('prunable'))
        table_rows.append(Row(name, *counts, cells, best))
        if kind == 'hydra' and rival in networks:
            none_best = [False] * len(deltas)
            table_rows.append(Row('hydra - lwm', counts[0], None, None, deltas, none_best, True))
    return table_rows


def cell(column: Column, name: str, minus: str | None = None) -> Cell | None:
    """Returns a network's percentage in a column, or its lead on the network `minus` over the
    seeds that have both; None where there is none."""
    values = column.values.get(name, {})
    others = dict.fromkeys(values, 0) if minus is None else column.values.get(minus, {})
    points = [100 * (values[place] - others[place]) for place in values if place in others]
    if not points:
        return None
    std = float(np.std(points, ddof=1)) if len(points) > 1 else None
    return Cell(float(np.mean(points)), std, len(points))


def _notes(experiments: dict[str, list[dict]], found: dict[str, list[Column]]) -> list[str]:
    """Returns how the accuracies were measured, over which seeds, and their sampling error."""
    measured, errors = {}, []
    for column in (column for all_columns in found.values() for column in all_columns):
        counts = measured.setdefault((column.title, column.settings), set())
        counts.update(column.examples.values())
        for name, images in column.examples.items():
            errors += [math.sqrt(p * (1 - p) / images) for p in column.values[name].values()]
    alike: dict[str, list[str]] = {}
    for (title, settings), counts in measured.items():
        images = ' or '.join(f'{count:,}' for count in sorted(counts))
        if settings:
            alike.setdefault(settings + (images and f', {images} images'), []).append(title)
    lines = [f'{", ".join(titles)}: {settings}.' for settings, titles in alike.items()]
    for title in found:
        seeds = [str(result.get('seed')) for result in experiments[title]]
        if len(seeds) > 1:
            where = f'{title}: mean' if len(found) > 1 else 'Mean'
            lines.append(
                f'{where} ± sample standard deviation (divisor n − 1) over n = {len(seeds)} '
                f'trainings, seeds {", ".join(seeds)}; differences are taken seed by seed.'
            )
    if errors:
        one = ' of a single network' if any(len(experiments[title]) > 1 for title in found) else ''
        points = 100 * 1.96 * max(errors)
        lines.append(
            f'95 % confidence intervals{one} reach at most {points:.1f} points either way.'
        )
    return lines


def _distinct(measured: tuple) -> list[str]:
    """Returns the titles, with the settings where a title alone would stand for two columns."""
    titles = [title for title, _ in measured]
    return [f'{t} ({settings})' if titles.count(t) > 1 else t for t, settings in measured]


def _rank(network: dict):
    """Sorts by density, then by kind; other names come last among their equals."""
    kind = network['name'].partition('_')[0]
    density = network.get('density')
    place = ORDER.index(kind) if kind in ORDER else len(ORDER)
    return (kind != 'pretrain', -(1 if density is None else density), place, network['name'])
