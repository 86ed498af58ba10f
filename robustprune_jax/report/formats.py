"""The tables as text for a terminal, CSV and LaTeX."""

import csv
import io

from robustprune_jax.report.results import Block, Cell, Row, Table

# A lone hyphen stays one: a minus sign is written as such.
ESCAPED = str.maketrans(
    {
        **{special: f'\\{special}' for special in '%&#_{}$'},
        '\\': '\\textbackslash{}',
        '~': '\\textasciitilde{}',
        '^': '\\textasciicircum{}',
        '−': '$-$',
        '±': '$\\pm$',
        '+': '$+$',
    }
)


SIZES = {'bytes': 'sparse_bytes', 'multiply-adds': 'sparse_macs'}


def counts(table: Table) -> list[str]:
    """Returns the titles of what `counted` prints of each row."""
    found = [title for title, key in SIZES.items() if any(key in row.size for row in table.rows)]
    return ['density', 'kept / prunable', *found]


def counted(row: Row, titles: list[str]) -> list[str]:
    """Returns the printed density, kept / prunable and sizes of a row, '' where there is none."""
    kept = '' if row.kept is None else f'{row.kept:,} / {row.prunable or 0:,}'
    sizes = [_short(row.size.get(SIZES[title])) for title in titles[2:]]
    return ['' if row.density is None else f'{row.density:g}', kept, *sizes]


def _short(value: int | None) -> str:
    """Three digits and k, M or G."""
    if value is None:
        return ''
    exponent = min((len(str(value)) - 1) // 3, 3)
    return f'{value / 1000**exponent:.3g}{("", " k", " M", " G")[exponent]}'


def number(cell: Cell | None, row: Row, seeds: int) -> str:
    """Returns 'mean ± deviation (n=...)' as far as there is one, n where it is not all seeds."""
    if cell is None:
        return ''
    mean = format(cell.mean, '+z.1f' if row.delta else '.1f')
    deviation = '' if cell.std is None else f' ± {cell.std:.1f}'
    return mean + deviation + ('' if cell.n == seeds else f' (n={cell.n})')


def text(tables: list[Table]) -> str:
    """Returns tables in columns of characters: a line for each network, and for each density how
    many percentage points each other method is above (+) or below LWM."""
    return '\n\n'.join(map(_text, tables)) or 'No network has been evaluated yet.'


def _text(table: Table) -> str:
    titles = counts(table)
    lines = [['network', *titles, *(f'{title} %' for title in table.titles)]]
    starts = {}
    for block in table.blocks:
        if block.title:
            starts[len(lines)] = block.title
        lines += [[row.name, *counted(row, titles), *_numbers(row, block)] for row in block.rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    printed = [
        '  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = '-' * max(map(len, printed))
    for i, title in reversed(starts.items()):
        printed.insert(i, f'[{title}]')
    return '\n'.join([printed[0], rule, *printed[1:], rule, *table.notes])


def as_csv(tables: list[Table]) -> str:
    """Returns one line for each network of each recipe, and for each column its mean, standard
    deviation and number of seeds."""
    lines: dict[tuple, dict] = {}
    for table in tables:
        for block in table.blocks:
            for row in block.rows:
                line = lines.setdefault((block.title, row.name, row.density), {})
                line |= {'experiment': block.title} if block.title else {}
                line |= {'network': row.name, 'density': row.density}
                line |= {'kept': row.kept, 'prunable': row.prunable}
                line |= {title: row.size[key] for title, key in SIZES.items() if key in row.size}
                for title, cell in zip(table.titles, row.cells, strict=True):
                    keys = (f'{title} %', f'{title} std', f'{title} n')
                    line |= dict(zip(keys, cell or (None, None, None), strict=True))
    buffer = io.StringIO()
    fields = dict.fromkeys(field for line in lines.values() for field in line)
    writer = csv.DictWriter(buffer, list(fields), lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines.values())
    return buffer.getvalue()


def latex(tables: list[Table]) -> str:
    """Returns a tabular for each table, to be read with \\input; needs the package booktabs."""
    return '% \\usepackage{booktabs}\n' + '\n'.join(map(_latex, tables))


def _latex(table: Table) -> str:
    counted_as = counts(table)
    titles = ['network', *counted_as, *(f'{title} %' for title in table.titles)]
    lines = [
        *(f'% {note}' for note in table.notes),
        f'\\begin{{tabular}}{{l{"r" * (len(titles) - 1)}}}',
        '\\toprule',
        _line(map(_escaped, titles)),
    ]
    for block in table.blocks:
        density = None
        lines.append('\\midrule')
        if block.title:
            lines.append(
                f'\\multicolumn{{{len(titles)}}}{{l}}{{\\itshape {_escaped(block.title)}}} \\\\'
            )
        for row in block.rows:
            if density not in (None, row.density):
                lines.append('\\addlinespace')
            density = row.density
            numbers = [cell.replace('-', '−') for cell in _numbers(row, block)]
            cells = map(_escaped, [row.title, *counted(row, counted_as), *numbers])
            best = [False, *[False] * len(counted_as), *row.best]
            lines.append(
                _line(f'\\textbf{{{c}}}' if b else c for c, b in zip(cells, best, strict=True))
            )
    return '\n'.join([*lines, '\\bottomrule', '\\end{tabular}', ''])


def _numbers(row: Row, block: Block) -> list[str]:
    return [number(cell, row, len(block.seeds)) for cell in row.cells]


def _line(cells) -> str:
    return f'{" & ".join(cells)} \\\\'


def _escaped(cell: str) -> str:
    return cell.translate(ESCAPED)
