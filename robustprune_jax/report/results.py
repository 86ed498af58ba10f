"""The comparison of networks over seeds and recipes, as tables that any output format can print."""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import numpy as np

from robustprune_jax.report.columns import Column, columns
from robustprune_jax.report.disagreements import disagreements
from robustprune_jax.report.networks import BASELINE, label, part_of, titles


class Cell(NamedTuple):
    """A percentage, or a difference in percentage points: its mean over the seeds, its sample
    standard deviation (divisor n - 1; None for one seed), and the number n of seeds."""

    mean: float
    std: float | None
    n: int


class Row(NamedTuple):
    """A network, or (delta=True) another method minus LWM at one density, seed by seed.

    title: what it is called where its density stands beside it; size: what its result says of its
    bytes and multiply-adds, {} in results of earlier versions; cells: None where nothing was
    measured; best: whether a cell is ahead of each other fine-tuned network of the density, over
    the seeds that have both.
    """

    name: str
    title: str
    density: float | None
    kept: int | None
    prunable: int | None
    size: dict
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

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block.rows]


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
            _notes(experiments, found) + ([] if steps else _flattered(experiments, found)),
        )
        for measured, found in alike.items()
    ]


def _block(title: str, results: list[dict], shown: list[Column]) -> Block:
    return Block(title, [result.get('seed') for result in results], rows(results, shown))


def rows(results: list[dict], shown: list[Column]) -> list[Row]:
    """Returns the networks from dense to sparse, at each density LWM before the other methods, then
    what each other fine-tuned one is ahead of it."""
    every = [network for result in results for network in result['networks']]
    called = titles(every)
    networks = {part_of(network): network for network in reversed(every)}
    order = {method: place for place, method in enumerate(called)}

    def rank(part):
        return -(part.density or math.inf), order[part.method], part.phase != 'prune'

    table_rows = []
    for density, parts in groupby(sorted(networks, key=rank), lambda part: part.density):
        parts = list(parts)
        tuned = {part.method: networks[part]['name'] for part in parts if part.phase == 'finetune'}
        for part in parts:
            name = networks[part]['name']
            rivals = [other for other in tuned.values() if other != name]
            counts = [networks[part].get(key) for key in ('density', 'kept', 'prunable')]
            counts.append(networks[part].get('size') or {})
            cells = [cell(column, name) for column in shown]
            best = [part.phase == 'finetune' and _leads(column, name, rivals) for column in shown]
            table_rows.append(Row(name, label(part, called), *counts, cells, best))
        if BASELINE in tuned:
            others = [method for method in tuned if method != BASELINE]
            table_rows += [_difference(x, density, tuned, called, shown) for x in others]
    return table_rows


def _difference(method, density, tuned, called, shown) -> Row:
    """Returns how far the network of a method is ahead of that of LWM."""
    name, title = f'{method} - {BASELINE}', f'{called[method]} − {called[BASELINE]}'
    deltas = [cell(column, tuned[method], tuned[BASELINE]) for column in shown]
    return Row(name, title, density, None, None, {}, deltas, [False] * len(shown), delta=True)


def _leads(column: Column, name: str, rivals: list[str]) -> bool:
    """Returns whether a network is ahead of each of the others that were measured."""
    deltas = [cell(column, name, rival) for rival in rivals if rival in column.values]
    # Equal results are highlighted in no row; the bound is for rounding of means.
    return bool(deltas) and all(delta is not None and delta.mean > 1e-9 for delta in deltas)


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


def _flattered(experiments: dict[str, list[dict]], found: Iterable[str]) -> list[str]:
    """Returns where attacks disagree, experiment by experiment."""
    sentences = []
    for title in found:
        networks = [network for result in experiments[title] for network in result['networks']]
        where = f'{title}: ' if len(experiments) > 1 else ''
        sentences += [f'{where}{sentence}' for sentence in disagreements(networks)]
    return sentences


def _distinct(measured: tuple) -> list[str]:
    """Returns the titles, with the settings where a title alone would stand for two columns."""
    titles = [title for title, _ in measured]
    return [f'{t} ({settings})' if titles.count(t) > 1 else t for t, settings in measured]
