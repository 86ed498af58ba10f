"""The HTML page of a report: one file, nothing to fetch."""

import base64
from html import escape

from robustprune_jax.report import results
from robustprune_jax.report.figures import Drawn
from robustprune_jax.report.run import Run

STYLE = """
body { max-width: 58rem; margin: 2.5rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff;
       font: 1rem/1.55 Charter, 'Bitstream Charter', Cambria, Georgia, serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: 1rem 0; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; border-top: 2px solid; border-bottom: 2px solid;
        font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child { text-align: left; padding-left: .2rem; }
thead th { border-bottom: 1px solid; }
tr.group > * { border-top: 1px solid #bbb; }
tr.delta > * { color: #555; font-style: italic; }
td.best { font-weight: bold; }
p, figcaption { margin: .5rem 0; } figcaption, .note { color: #555; font-size: .9rem; }
figure { margin: 0; } figure img { width: 100%; min-width: 34rem; height: auto; }
.missing { border-left: 3px solid #d55e00; padding: .1rem 1rem; }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; font-size: .85rem; } }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; }
  figure, table { break-inside: avoid; } figure img { min-width: 0; } }
"""
NAMES = {
    'pretrain': 'pretrained',
    'lwm': 'LWM',
    'pruned': 'learned, before fine-tuning',
    'hydra': 'learned',
    'hydra - lwm': 'learned − LWM',
}


def html(run: Run, figures: list[Drawn]) -> str:
    """Returns the page of a run with its figures embedded."""
    result = run.result
    title = f'Robust pruning of {result.get("arch", run.workdir.resolve().name)}'
    sections = [_facts(result), _missing(run.missing), _table(result), *map(_figure, figures)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n'
        f'<body>\n<h1>{escape(title)}</h1>\n{"".join(sections)}</body></html>\n'
    )


def _facts(result: dict) -> str:
    facts = {
        'Architecture': result.get('arch'),
        'Data': result.get('dataset'),
        'Objective': result.get('objective'),
        'Seed': result.get('seed'),
        'Time': _duration(result['seconds']) if 'seconds' in result else None,
        'Versions': ', '.join(f'{k} {v}' for k, v in (result.get('versions') or {}).items()),
    }
    items = [
        f'<dt>{name}</dt><dd>{escape(str(value))}</dd>\n'
        for name, value in facts.items()
        if value not in (None, '')
    ]
    return f'<dl>\n{"".join(items)}</dl>\n' if items else ''


def _missing(sentences: list[str]) -> str:
    if not sentences:
        return ''
    items = ''.join(f'<li>{escape(text)}</li>\n' for text in sentences)
    return f'<div class="missing"><p>Missing from this report:</p>\n<ul>{items}</ul></div>\n'


def _table(result: dict) -> str:
    if not result['networks']:
        return ''
    head = ''.join(f'<th scope="col">{escape(title)}</th>' for title in results.head(result))
    body, density = '', None
    for row in results.rows(result):
        kind = row.name if row.delta else row.name.partition('_')[0]
        name, *cells = results.texts(row)
        classes = [row.delta and 'delta', row.density != density and body and 'group']
        density = row.density
        # Density and counts, then the accuracies, of which the better one is bold.
        best = [False, False, *row.best]
        body += f'<tr class="{" ".join(c for c in classes if c)}">'
        body += f'<th scope="row">{escape(NAMES.get(kind, name))}</th>'
        body += ''.join(
            f'<td{" class=best" if bold else ""}>{escape(cell.replace("-", "−"))}</td>'
            for cell, bold in zip(cells, best, strict=True)
        )
        body += '</tr>\n'
    notes = ' '.join(results.notes(result))
    return (
        f'<h2>Results</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f'<tbody>{body}</tbody></table></div>\n<p class="note">{escape(notes)} '
        'Bold: the better mask at a density; differences in percentage points.</p>\n'
    )


def _figure(figure: Drawn) -> str:
    data = base64.b64encode(figure.png).decode()
    return (
        f'<h2>{escape(figure.title)}</h2>\n<figure><div class="wide">'
        f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}"></div>\n'
        f'<figcaption>{escape(figure.caption)}</figcaption></figure>\n'
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {rest} s' if minutes else f'{rest} s'
