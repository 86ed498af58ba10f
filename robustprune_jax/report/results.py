"""The comparison of a run's networks, as rows that any output format can print."""

import math
from typing import NamedTuple

ORDER = ('pretrain', 'lwm', 'pruned', 'hydra')
NORMS = {'linf': 'l_inf', 'l2': 'l_2'}
TITLES = {
    'standard': 'standard attack',
    'ibp': 'IBP',
    'crown_ibp': 'CROWN-IBP',
    'crown': 'CROWN',
    'symbolic': 'symbolic',
}


class Column(NamedTuple):
    """An accuracy: its title, how it was measured, and by network name the accuracy in [0, 1] and
    the number of images (where the result says it)."""

    title: str
    settings: str
    values: dict[str, float]
    examples: dict[str, int]


class Row(NamedTuple):
    """A network, or (delta=True) learned minus LWM at one density, in percentage points.

    cells: percentages, None where there is none; best: whether a cell is the better one of the
    pair learned and LWM.
    """

    name: str
    density: float | None
    kept: int | None
    prunable: int | None
    cells: list[float | None]
    best: list[bool]
    delta: bool = False


def columns(result: dict) -> list[Column]:
    """Returns the clean accuracy and every robust one that some network has."""
    found: dict[str, Column] = {'clean': Column('clean', '', {}, {})}
    for network in result['networks']:
        measured = [('clean', {**network, 'accuracy': network.get('clean_accuracy')})]
        measured += (network.get('robust') or {}).items()
        for evaluation, entry in measured:
            for title, accuracy in _accuracies(evaluation, entry):
                column = found.setdefault(title, Column(title, _settings(entry), {}, {}))
                column.values[network['name']] = accuracy
                if entry.get('examples'):
                    column.examples[network['name']] = entry['examples']
    return list(found.values())


def rows(result: dict) -> list[Row]:
    """Returns the networks from dense to sparse, LWM before learned, then their difference."""
    all_columns = columns(result)
    networks = sorted(result['networks'], key=_rank)
    names = {network['name'] for network in networks}
    table_rows = []
    for network in networks:
        name = network['name']
        kind, _, density = name.partition('_')
        rival = {'hydra': f'lwm_{density}', 'lwm': f'hydra_{density}'}.get(kind)
        cells = [_percent(column.values.get(name)) for column in all_columns]
        rivals = [_percent(column.values.get(rival)) for column in all_columns]
        # An equal result is highlighted in neither row.
        best = [None not in two and two[0] > two[1] for two in zip(cells, rivals, strict=True)]
        counts = (network.get('density'), network.get('kept'), network.get('prunable'))
        table_rows.append(Row(name, *counts, cells, best))
        if kind == 'hydra' and rival in names:
            deltas = [
                None if None in two else two[0] - two[1] for two in zip(cells, rivals, strict=True)
            ]
            none_best = [False] * len(deltas)
            table_rows.append(Row('hydra - lwm', counts[0], None, None, deltas, none_best, True))
    return table_rows


def texts(row: Row) -> list[str]:
    """Returns the printed cells of a row: name, density, kept / prunable, accuracies."""
    kept = '' if row.kept is None else f'{row.kept:,} / {row.prunable or 0:,}'
    form = '+z.1f' if row.delta else '.1f'
    cells = ['' if cell is None else format(cell, form) for cell in row.cells]
    return [row.name, '' if row.density is None else f'{row.density:g}', kept, *cells]


def head(result: dict) -> list[str]:
    """Returns the titles above `texts`."""
    titles = [f'{column.title} %' for column in columns(result)]
    return ['network', 'density', 'kept / prunable', *titles]


def notes(result: dict) -> list[str]:
    """Returns how the accuracies were measured: a sentence for each robust column, one on their
    sampling error."""
    all_columns = columns(result)
    errors = [
        math.sqrt(accuracy * (1 - accuracy) / column.examples[name])
        for column in all_columns
        for name, accuracy in column.values.items()
        if name in column.examples
    ]
    lines = [f'{column.title}: {column.settings}.' for column in all_columns if column.settings]
    if errors:
        points = 100 * 1.96 * max(errors)
        lines.append(f'95 % confidence intervals reach at most {points:.1f} points either way.')
    return lines


def table(result: dict) -> str:
    """Returns the comparison as plain text: a line for each network, and for each density how
    many percentage points the learned mask is above (+) or below LWM.

    result: what result.json holds; `networks` may be absent or incomplete.
    """
    result = {'networks': [], **result}
    if not result['networks']:
        return 'No network has been evaluated yet.'
    lines = [head(result), *(texts(row) for row in rows(result))]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    printed = [
        '  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = '-' * max(map(len, printed))
    return '\n'.join([printed[0], rule, *printed[1:], rule, *notes(result)])


def _rank(network: dict):
    """Sorts by density, then by kind; other names come last among their equals."""
    kind = network['name'].partition('_')[0]
    density = network.get('density')
    place = ORDER.index(kind) if kind in ORDER else len(ORDER)
    return (kind != 'pretrain', -(1 if density is None else density), place, network['name'])


def _accuracies(evaluation: str, entry: dict) -> list[tuple[str, float]]:
    """Returns (title, accuracy) of an evaluation; smoothing has one for each radius."""
    if evaluation == 'pgd':
        title = f'PGD-{entry["steps"]}' if 'steps' in entry else 'PGD'
    else:
        title = TITLES.get(evaluation, evaluation)
    if entry.get('accuracy') is not None:
        return [(title, entry['accuracy'])]
    certified = entry.get('certified_accuracy') or {}
    return [(f'{title} r={radius}', accuracy) for radius, accuracy in certified.items()]


def _settings(entry: dict) -> str:
    """Returns an evaluation's settings in words."""
    restarts = entry.get('restarts')
    words = [
        NORMS.get(entry.get('norm'), entry.get('norm')),
        *(f'{key} {entry[key]:g}' for key in ('eps', 'sigma', 'alpha') if key in entry),
        f'{entry["n"]:,} samples' if 'n' in entry else None,
        restarts and f'{restarts} restart{"s" if restarts > 1 else ""}',
        f'{entry["examples"]:,} images' if 'examples' in entry else None,
    ]
    return ', '.join(word for word in words if word)


def _percent(accuracy: float | None) -> float | None:
    return None if accuracy is None else 100 * accuracy
