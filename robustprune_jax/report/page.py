"""The HTML page of a report: one file, nothing to fetch."""

import base64
from html import escape
from typing import NamedTuple

from robustprune_jax.report.experiments import Experiment, facts, fields_apart
from robustprune_jax.report.formats import counted, counts, number
from robustprune_jax.report.results import Cell, Row, Table, tables

STYLE = """
body { max-width: 58rem; margin: 2.5rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff;
       font: 1rem/1.55 Charter, 'Bitstream Charter', Cambria, Georgia, serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; } h3 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
h2.experiment { border-top: 1px solid #bbb; padding-top: 1.6rem; margin-top: 3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: 1rem 0; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; border-top: 2px solid; border-bottom: 2px solid;
        font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child { text-align: left; padding-left: .2rem; }
thead th { border-bottom: 1px solid; white-space: normal; vertical-align: bottom; }
.wide + .wide, .note + .wide { margin-top: 1.6rem; } table.recipes { font-size: .85rem; }
tr.group > * { border-top: 1px solid #bbb; }
tr.block th { border-top: 1px solid; border-bottom: 1px solid #bbb; font-style: italic; }
tr.delta > * { color: #555; font-style: italic; }
td.best { font-weight: bold; }
td span { display: inline-block; min-width: 2.8rem; text-align: left; white-space: pre; color: #555;
          font-weight: normal; font-size: .85em; }
p, figcaption { margin: .5rem 0; } figcaption, .note { color: #555; font-size: .9rem; }
figure { margin: 0; } figure img { width: 100%; min-width: 44rem; height: auto; }
.notes { border-left: 3px solid #d55e00; padding: .1rem 1rem; }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; font-size: .85rem; } }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; }
  figure, table { break-inside: avoid; } figure img { min-width: 0; } }
"""


class Drawn(NamedTuple):
    """A figure: its file name without the ending, title, what it shows, the PNG and the SVG."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


def html(experiments: list[Experiment], figures: list[list[Drawn]], notes: list[str]) -> str:
    """Returns the page of experiments, with the figures of each embedded."""
    alone = len(experiments) == 1
    folder = experiments[0].runs[0].workdir.resolve().name
    subject = facts(experiments[0].runs[0])['Architecture'] or folder
    title = f'Robust pruning of {subject}'
    if not alone:
        runs = sum(len(experiment.runs) for experiment in experiments)
        title = f'Robust pruning: {len(experiments)} experiments, {runs} runs'
    results = {experiment.title: experiment.results for experiment in experiments}
    sections = [
        _facts(experiments[0]) if alone else '',
        _notes(notes),
        _tables('Results', tables(results)),
        _tables('Ensembles, one attack after the other', tables(results, steps=True)),
    ]
    for experiment, drawn in zip(experiments, figures, strict=True):
        if not alone:
            sections.append(f'<h2 class="experiment">{escape(experiment.title)}</h2>\n')
            sections.append(_facts(experiment))
        sections += map(_figure, drawn)
    sections.append(_recipes(experiments))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n'
        f'<body>\n<h1>{escape(title)}</h1>\n{"".join(sections)}</body></html>\n'
    )


def _facts(experiment: Experiment) -> str:
    results = experiment.results
    seeds = [str(result.get('seed')) for result in results if result.get('seed') is not None]
    times = [result.get('seconds') for result in results]
    versions = {
        f'{name} {version}': None
        for result in results
        if isinstance(result.get('versions'), dict)
        for name, version in result['versions'].items()
    }
    values = {
        **facts(experiment.runs[0]),
        'Seed' if len(seeds) == 1 else 'Seeds': ', '.join(seeds),
        'Time': _duration(sum(t for t in times if isinstance(t, int | float))),
        'Folder': ', '.join(str(run.workdir) for run in experiment.runs),
        'Versions': ', '.join(versions),
    }
    items = [f'<dt>{k}</dt><dd>{escape(value)}</dd>\n' for k, value in values.items() if value]
    return f'<dl>\n{"".join(items)}</dl>\n' if items else ''


def _notes(notes: list[str]) -> str:
    if not notes:
        return ''
    items = ''.join(f'<li>{escape(text)}</li>\n' for text in notes)
    return f'<div class="notes"><p>About the files of this report:</p>\n<ul>{items}</ul></div>\n'


def _tables(title: str, tables: list[Table]) -> str:
    return f'<h2>{title}</h2>\n{"".join(map(_table, tables))}' if tables else ''


def _table(table: Table) -> str:
    accuracies = [
        f'{title}\N{NO-BREAK SPACE}%'.replace('-', '\N{NON-BREAKING HYPHEN}')
        for title in table.titles
    ]
    columns = counts(table)
    titles = ['network', *columns, *accuracies]
    head = ''.join(f'<th scope="col">{_maths(title)}</th>' for title in titles)
    body = ''
    for block in table.blocks:
        if block.title:
            body += (
                f'<tr class="block"><th colspan="{len(titles)}">{escape(block.title)}</th></tr>\n'
            )
        density = None
        for row in block.rows:
            starts = density not in (None, row.density)
            density = row.density
            classes = [row.delta and 'delta', starts and 'group']
            body += f'<tr class="{" ".join(c for c in classes if c)}">'
            body += f'<th scope="row">{escape(row.title)}</th>'
            body += ''.join(f'<td>{escape(text)}</td>' for text in counted(row, columns))
            body += ''.join(
                f'<td{" class=best" if best else ""}>{_number(cell, row, len(block.seeds))}</td>'
                for cell, best in zip(row.cells, row.best, strict=True)
            )
            body += '</tr>\n'
    notes = _maths(' '.join(table.notes))
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f'<tbody>{body}</tbody></table></div>\n<p class="note">{notes} '
        'Bold: the best fine-tuned mask at a density; differences in percentage points.</p>\n'
    )


def _recipes(experiments: list[Experiment]) -> str:
    apart = fields_apart(experiments)
    if not apart:
        return ''
    head = ''.join(f'<th scope="col">{escape(experiment.title)}</th>' for experiment in experiments)
    body = ''.join(
        f'<tr><th scope="row">{escape(field)}</th>'
        + ''.join(f'<td>{escape(str(value))}</td>' for value in values)
        + '</tr>\n'
        for field, values in apart.items()
    )
    return (
        '<h2>Where the recipes differ</h2>\n<div class="wide"><table class="recipes"><thead>'
        f'<tr><th scope="col">field</th>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def _number(cell: Cell | None, row: Row, seeds: int) -> str:
    """Returns a cell with a true minus sign, what follows the mean in a smaller type."""
    mean, *rest = number(cell, row, seeds).replace('-', '−').split(' ', 1)
    return mean + (f'<span> {rest[0]}</span>' if rest else '')


def _maths(text: str) -> str:
    """Returns text as HTML, with the norms as they are written in papers."""
    text = escape(text).replace('l_inf', '<i>ℓ</i><sub>∞</sub>')
    return text.replace('l_2', '<i>ℓ</i><sub>2</sub>')


def _figure(figure: Drawn) -> str:
    data = base64.b64encode(figure.svg).decode()
    return (
        f'<h3>{escape(figure.title)}</h3>\n<figure><div class="wide">'
        f'<img alt="{escape(figure.title)}" src="data:image/svg+xml;base64,{data}"></div>\n'
        f'<figcaption>{escape(figure.caption)}</figcaption></figure>\n'
    )


def _duration(seconds: float) -> str:
    """Returns a time in its two largest units, '' for none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {rest} s' if minutes else f'{rest} s' if rest else ''
