"""The report: the table's numbers by hand, pages from whole, partial and damaged runs."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conversion import save_pth
from robustprune_jax import report
from robustprune_jax.config import default
from robustprune_jax.config.parts import Part
from robustprune_jax.report import __main__ as command
from robustprune_jax.report import columns, formats, results
from robustprune_jax.report.experiments import Experiment, experiments, fields_apart
from robustprune_jax.report.figures import style, weights
from robustprune_jax.report.run import Run, read

PNG = b'\x89PNG\r\n'
FIGURES = ['accuracy_by_compression', 'layers', 'training', 'weights_0.05', 'weights_0.1']
TITLES = {'hydra': 'HYDRA', 'lwm': 'LWM', 'rank': 'Rank pruning', None: 'pretrained'}
PRETRAIN = Part('pretrain')


def tuned(method, density):
    return Part('finetune', method, density)


PARTS = [PRETRAIN] + [
    part
    for density in (0.1, 0.05)
    for part in (Part('prune', 'hydra', density), tuned('hydra', density), tuned('lwm', density))
]


def network(part, clean, pgd, **robust):
    entry = {'accuracy': pgd, 'examples': 400, 'eps': 0.1, 'steps': 20, 'norm': 'linf'}
    kept = round(2000 * (part.density or 1))
    return {
        'name': part.network,
        'method': part.method,
        'phase': part.phase,
        'title': TITLES[part.method],
        'density': part.density or 1.0,
        'kept': kept,
        'prunable': 2000,
        'layers': {f'layer{i}/kernel': [kept // 2, 1000] for i in range(2)},
        'clean_accuracy': clean,
        'examples': 400,
        'robust': {'pgd': entry | {'restarts': 2}, **robust},
    }


def a_result():
    return {
        'arch': 'mnist_model',
        'dataset': '<digits>',
        'objective': 'trades',
        'seed': 3,
        'seconds': 125.4,
        'versions': {'jax': '0.10.2'},
        'networks': [
            network(tuned('hydra', 0.05), 0.9, 0.8),
            network(tuned('lwm', 0.05), 0.875, 0.8125),
            network(PRETRAIN, 0.95, 0.9),
            network(tuned('lwm', 0.1), 0.9, 0.8),
            network(tuned('hydra', 0.1), 0.9, 0.85),
        ],
    }


@pytest.fixture
def workdir(tmp_path):
    """A finished run at two densities, as the files of a run have it."""
    return a_run(tmp_path / 'run', a_result())


def a_run(tmp_path, result, parts=PARTS, **fields):
    config = default()
    config.update(seed=result['seed'], **fields)
    tmp_path.mkdir()
    (tmp_path / 'config.json').write_text(config.to_json())
    for folder in [tmp_path / part.folder for part in parts]:
        folder.mkdir(parents=True)
        lines = []
        for step in (5, 10):
            at = {'step': step, 'epoch': step / 10}
            lines += [
                {**at, 'loss': 2 / step, 'accuracy': 0.5, 'robust_accuracy': 0.4},
                {**at, 'validation_accuracy': 0.5, 'validation_robust_accuracy': 0.3},
            ]
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (folder / 'metrics.jsonl').write_text(text + '{"step": 15, "lo')  # killed while writing
    (tmp_path / 'export').mkdir()
    kernels = np.random.default_rng(0).normal(size=(2, 50, 40)).astype(np.float32)
    for entry in result['networks']:
        state = {f'layer{i}.weight': k * (k > 2 - entry['density']) for i, k in enumerate(kernels)}
        state['layer0.bias'] = np.ones(50, np.float32)
        checkpoint = {'arch': 'mnist_model', 'state_dict': state}
        save_pth(tmp_path / 'export' / f'{entry["name"]}.pth.tar', checkpoint)
    (tmp_path / 'result.json').write_text(json.dumps(result))
    return tmp_path


# --- the table --------------------------------------------------------------------------------


def test_sizes_have_columns_and_a_figure(tmp_path):
    result = a_result()
    for entry, count, macs in zip(
        result['networks'], (532, 600, 8000, 1000, 1100), (999, 1, 2_345_678, 1000, 20), strict=True
    ):
        entry['size'] = {'sparse_bytes': count, 'sparse_macs': macs}
    assert [line[12:59] for line in report.table(result).splitlines()[:4]] == [
        ' density  kept / prunable  bytes  multiply-adds',
        '-' * 47,
        '       1    2,000 / 2,000    8 k         2.35 M',
        '     0.1      200 / 2,000    1 k            1 k',
    ]
    folder = a_run(tmp_path / 'run', result)
    page = report.write(folder).read_text()
    assert 'multiply-adds</th>' in page and 'Accuracy against size' in page
    first = (folder / 'report' / 'table.csv').read_text().splitlines()[:2]
    assert ',bytes,multiply-adds,' in first[0] and ',8000,2345678,' in first[1]


def test_table_by_hand():
    assert report.table(a_result()).splitlines() == [
        'network      density  kept / prunable  clean %  PGD-20 %',
        '--------------------------------------------------------',
        'pretrain           1    2,000 / 2,000     95.0      90.0',
        'lwm_0.1          0.1      200 / 2,000     90.0      80.0',
        'hydra_0.1        0.1      200 / 2,000     90.0      85.0',
        'hydra - lwm      0.1                      +0.0      +5.0',
        'lwm_0.05        0.05      100 / 2,000     87.5      81.2',
        'hydra_0.05      0.05      100 / 2,000     90.0      80.0',
        'hydra - lwm     0.05                      +2.5      -1.2',
        '--------------------------------------------------------',
        'PGD-20: l_inf, eps 0.1, 2 restarts, 400 images.',
        # 1.96 * sqrt(0.8 * 0.2 / 400) = 3.9 points
        '95 % confidence intervals reach at most 3.9 points either way.',
    ]


def rows_of(*all_results):
    (table,) = results.tables({'': list(all_results)})
    return table.blocks[0].rows


def test_the_better_of_a_pair_is_marked():
    best = {row.name: row.best for row in rows_of(a_result()) if not row.delta}
    assert best == {
        'pretrain': [False, False],
        'lwm_0.1': [False, False],  # equal clean accuracy
        'hydra_0.1': [False, True],
        'lwm_0.05': [False, True],
        'hydra_0.05': [True, False],
    }


def test_a_column_for_every_evaluation():
    certified = {'0.25': 0.75, '0.5': 0.5}
    smooth = {'sigma': 0.25, 'n': 1000, 'alpha': 0.001, 'examples': 100, 'acr': 0.4}
    result = a_result()
    result['networks'].append(
        network(
            Part('prune', 'hydra', 0.1), 0.7, 0.6,
            ibp={'accuracy': 0.5, 'eps': 0.1, 'norm': 'linf', 'examples': 400},
            smooth={**smooth, 'certified_accuracy': certified},
        )
    )  # fmt: skip
    found = columns.columns([result])
    titles = ['clean', 'PGD-20', 'IBP', 'smooth r=0.25', 'smooth r=0.5']
    assert [column.title for column in found] == titles
    assert found[2].values == {'hydra_0.1_pruned': {0: 0.5}}
    assert found[4].settings == 'sigma 0.25, alpha 0.001, 1,000 samples'
    names = [row.name for row in rows_of(result)]
    assert names[1:5] == ['lwm_0.1', 'hydra_0.1_pruned', 'hydra_0.1', 'hydra - lwm']
    assert rows_of(result)[2].title == 'HYDRA, before fine-tuning'
    # The 100 images of smoothing: 1.96 * sqrt(0.5 * 0.5 / 100).
    lines = report.table(result).splitlines()
    assert lines[-1].startswith('95 % confidence intervals reach at most 9.8 ')
    assert lines[-2].endswith('sigma 0.25, alpha 0.001, 1,000 samples, 100 images.')
    assert lines[4].split()[-5:] == ['70.0', '60.0', '50.0', '75.0', '50.0']
    assert lines[3].split()[-2:] == ['90.0', '80.0']  # nothing where it was not evaluated


def with_rank():
    """A third method, which is not fine-tuned at 0.05."""
    result = a_result()
    result['networks'] += [
        network(Part('prune', 'rank', 0.05), 0.5, 0.5),
        network(tuned('rank', 0.1), 0.9, 0.875),
    ]
    return result


def test_a_third_method_in_the_table():
    lines = report.table(with_rank()).splitlines()[3:-3]
    assert [line.split('  ')[0] for line in lines] == [
        'lwm_0.1',
        'hydra_0.1',
        'rank_0.1',
        'hydra - lwm',
        'rank - lwm',
        'lwm_0.05',
        'hydra_0.05',
        'rank_0.05_pruned',
        'hydra - lwm',
    ]
    assert lines[4].split()[-3:] == ['0.1', '+0.0', '+7.5']
    rows = {(row.name, row.density): row for row in rows_of(with_rank())}
    assert rows['rank - lwm', 0.1].title == 'Rank pruning − LWM'
    # The best of three at 0.1; at 0.05 the one that is not fine-tuned does not compete.
    best = {name: row.best for (name, _), row in rows.items() if any(row.best)}
    assert best == {
        'rank_0.1': [False, True],
        'lwm_0.05': [False, True],
        'hydra_0.05': [True, False],
    }


def test_a_network_of_no_method_goes_by_its_name():
    """One that was imported, say, and evaluated alone."""
    result = a_result()
    imported = {'name': 'theirs', 'method': None, 'title': None}
    result['networks'].append(result['networks'][3] | imported)
    titles = {row.name: row.title for row in rows_of(result) if row.density == 0.1}
    assert titles['theirs'] == 'theirs' and titles['theirs - lwm'] == 'theirs − LWM'


def test_a_lead_on_one_rival_is_not_marked():
    """HYDRA and the third method are level under attack, both ahead of LWM."""
    result = with_rank()
    result['networks'][-1]['robust']['pgd']['accuracy'] = 0.85
    assert not any(any(row.best) for row in rows_of(result) if row.density == 0.1)


def test_table_of_an_unfinished_run():
    assert report.table({}) == 'No network has been evaluated yet.'


# --- the page ---------------------------------------------------------------------------------


def embedded(page):
    images = re.findall('data:image/svg\\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(data) for data in images]


def test_page_of_a_whole_run(workdir):
    path = report.write(str(workdir))
    assert path == workdir / 'report' / 'index.html'
    page = path.read_text()
    figures = [f'{name}.{kind}' for name in FIGURES for kind in ('png', 'svg')]
    files = sorted(['index.html', 'table.csv', 'table.tex', *figures])
    assert sorted(p.name for p in path.parent.iterdir()) == files
    drawn = [(path.parent / f'{name}.svg').read_bytes() for name in FIGURES]
    assert sorted(embedded(page)) == sorted(drawn)
    assert all((path.parent / f'{name}.png').read_bytes().startswith(PNG) for name in FIGURES)
    assert 'About the files' not in page
    assert '2 min 5 s' in page and 'jax 0.10.2' in page
    assert '<td class=best>85.0</td>' in page and '−1.2' in page
    # Nothing to fetch: no address but the embedded data.
    assert re.findall(r'(?:src|href)="(?!data:)|https?://|@import|url\(', page) == []


def test_a_third_method_in_the_figures(tmp_path):
    parts = [*PARTS, Part('prune', 'rank', 0.1), tuned('rank', 0.1), Part('prune', 'rank', 0.05)]
    report.write(a_run(tmp_path / 'run', with_rank(), parts))
    drawn = {x: (tmp_path / f'run/report/{x}.svg').read_text() for x in FIGURES}
    # A comment names each text that is drawn.
    shown = {name for name, svg in drawn.items() if '<!-- Rank pruning' in svg}
    assert shown == {'accuracy_by_compression', 'layers', 'training'}
    assert '<!-- kept by Rank pruning -->' in drawn['weights_0.1']
    colour = style.lines(TITLES)['rank']['color']
    for name in ('accuracy_by_compression', 'weights_0.1'):
        assert colour in drawn[name], name


def test_methods_are_told_apart():
    methods = ['lwm', 'hydra', *(f'method{i}' for i in range(12))]
    drawn = style.lines({None: 'pretrained', **dict.fromkeys(methods, 'title')})
    assert list(drawn) == methods
    assert len({(x['color'], x['marker']) for x in drawn.values()}) == len(methods)
    assert len({x['color'] for x in list(drawn.values())[:6]}) == 6


def test_reading_leaves_out_a_cut_line_and_what_is_no_kernel(workdir):
    run = read(workdir)
    assert [line['step'] for line in run.metrics[PRETRAIN]] == [5, 5, 10, 10]
    assert list(run.weights[tuned('hydra', 0.1)]) == [f'layer{i}' for i in range(2)]
    assert Experiment('', [run]).densities == [0.1, 0.05] and run.notes == []


def test_missing_parts_are_named(workdir):
    (workdir / 'density_0.1/lwm/finetune/metrics.jsonl').unlink()
    (workdir / 'density_0.05/hydra/prune/metrics.jsonl').write_text('{"st')
    metrics = workdir / 'density_0.1/hydra/prune/metrics.jsonl'
    metrics.write_text('no JSON\n[]\n{"step": 1, "epoch": "x", "loss": 1}\n' + metrics.read_text())
    (workdir / 'export' / 'lwm_0.05.pth.tar').unlink()
    (workdir / 'export' / 'hydra_0.1.pth.tar').write_bytes(b'PK no zip')
    shutil.copy(workdir / 'export/pretrain.pth.tar', workdir / 'export/mine.pth.tar')
    page = report.write(workdir).read_text()
    for text in (
        'density_0.1/lwm/finetune/metrics.jsonl: no lines',
        'density_0.05/hydra/prune/metrics.jsonl: no lines',
        'density_0.1/hydra/prune/metrics.jsonl: left out what is damaged, line 1 and 1 more',
        'export/lwm_0.05.pth.tar: not there',
        'export/hydra_0.1.pth.tar: not an exported network',
        'export/mine.pth.tar: of no part of this run',
    ):
        assert f'<li>{text}' in page
    assert len(embedded(page)) == 5  # each density has one network left to compare


@pytest.mark.parametrize('content', [None, '{"networks": 3}', '[]', '{"networks": [{}]}', '{'])
def test_no_usable_result(workdir, content):
    path = workdir / 'result.json'
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    run = read(workdir)
    assert run.notes[0].startswith('result.json: not the')
    assert run.result['networks'] == [] and len(run.metrics) == 7 and len(run.weights) == 5


def test_result_alone(tmp_path):
    result = a_result() | {'arch': '<arch>'}
    (tmp_path / 'result.json').write_text(json.dumps(result))
    page = report.write(tmp_path).read_text()
    assert len(embedded(page)) == 1 and '<h3>Accuracy against compression</h3>' in page
    assert '<li>result.json: alone here' in page and '<li>config.json: not there' in page
    assert 'metrics.jsonl' not in page and '.pth.tar' not in page
    assert '&lt;arch&gt;' in page and '<arch>' not in page


def test_one_density_has_no_figure_over_densities(workdir):
    shutil.rmtree(workdir / 'export')
    result = a_result()
    result['networks'] = [n for n in result['networks'] if n['density'] != 0.05]
    (workdir / 'result.json').write_text(json.dumps(result))
    assert '<h3>Accuracy against compression</h3>' not in report.write(workdir).read_text()


def test_deep_networks_show_some_of_their_layers():
    layers = {f'layer{i}': np.arange(6.0).reshape(2, 3) for i in range(40)}
    networks = {PRETRAIN: layers, tuned('lwm', 0.1): layers}
    run = Run(Path('.'), None, {'networks': []}, {}, networks, {}, [])
    caption = weights.histograms(Experiment('', [run]), 0.1).caption
    assert caption.endswith('12 of 40 layers, evenly spaced.')


def test_networks_of_other_shapes_are_not_compared(workdir):
    other = {'state_dict': {'layer0.weight': np.ones((2, 2), np.float32)}}
    save_pth(workdir / 'export' / 'pretrain.pth.tar', other)
    assert '<h3>Which weights' not in report.write(workdir).read_text()


@pytest.mark.parametrize(
    ('content', 'note'),
    [
        ({'state_dict': 5}, 'not an exported network'),
        ([1], 'not an exported network'),
        ({'state_dict': {'layer0.weight': 3}}, 'not an exported network'),
        (
            {'state_dict': {'layer0.weight': np.full((2, 2), np.nan)}},
            'empty or not finite in layer0',
        ),
        ({'state_dict': {'layer0.weight': np.ones((0, 2))}}, 'empty or not finite in layer0'),
    ],
)
def test_a_damaged_export_is_left_out_of_the_figures(workdir, content, note):
    save_pth(workdir / 'export' / 'pretrain.pth.tar', content)
    run = read(workdir)
    assert any(x.startswith(f'export/pretrain.pth.tar: {note}') for x in run.notes)
    named = [('hydra', 0.05), ('lwm', 0.05), ('lwm', 0.1), ('hydra', 0.1)]
    assert list(run.weights) == [tuned(*network) for network in named]


def test_networks_that_get_nothing_right_are_reported(workdir):
    result = a_result()
    for entry in result['networks']:
        entry['clean_accuracy'] = entry['robust']['pgd']['accuracy'] = 0.0
    (workdir / 'result.json').write_text(json.dumps(result))
    shutil.rmtree(workdir / 'export')
    page = report.write(workdir).read_text()
    assert '<td>0.0</td>' in page and 'Accuracy against compression' not in page


def test_no_run(tmp_path):
    (tmp_path / 'photos').mkdir()
    with pytest.raises(FileNotFoundError, match='no run in'):
        report.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['photos']


# --- many runs --------------------------------------------------------------------------------


def seed_of(seed, **shifts):
    """The result of another seed, the clean accuracies of networks shifted."""
    result = a_result() | {'seed': seed}
    for entry in result['networks']:
        entry['clean_accuracy'] += shifts.get(entry['method'], 0)
    return result


def test_sweep_by_hand():
    """Over seeds: HYDRA 90, 93 and 96 %, LWM 90, 90 and 87 %."""
    all_results = [seed_of(0), seed_of(1, hydra=0.03), seed_of(2, hydra=0.06, lwm=-0.03)]
    del all_results[2]['networks'][2]  # no pretrained network in seed 2
    text = formats.text(results.tables({'': all_results})).splitlines()
    cells = {row.name: row.cells[0] for row in rows_of(*all_results) if row.density == 0.1}
    assert cells['hydra_0.1'] == pytest.approx((93, 3, 3))
    assert cells['lwm_0.1'] == pytest.approx((89, 3**0.5, 3))
    # 0, 3 and 9 points seed by seed: not what the two deviations would give if independent.
    assert cells['hydra - lwm'] == pytest.approx((4, 21**0.5, 3))
    assert '+4.0 ± 4.6' in text[5] and '93.0 ± 3.0' in text[4]
    assert '95.0 ± 0.0 (n=2)' in text[2]
    assert text[-2].startswith('Mean ± sample standard deviation (divisor n − 1) over n = 3 train')


def test_only_seeds_that_have_both_are_compared():
    one, two = seed_of(0), seed_of(1, hydra=-0.5)
    two['networks'] = [x for x in two['networks'] if x['name'] != 'lwm_0.1']
    rows = {row.name: row for row in rows_of(one, two) if row.density == 0.1}
    assert rows['hydra - lwm'].cells[1] == pytest.approx((5, None, 1))
    assert rows['hydra_0.1'].best == [False, True] and rows['lwm_0.1'].best == [False, False]


def test_other_settings_are_other_columns():
    other = seed_of(1)
    for entry in other['networks']:
        entry['robust']['pgd']['eps'] = 0.2
    (table,) = results.tables({'': [seed_of(0), other]})
    assert table.titles[1:] == [
        'PGD-20 (l_inf, eps 0.1, 2 restarts)',
        'PGD-20 (l_inf, eps 0.2, 2 restarts)',
    ]
    # Recipes measured in different ways have tables of their own.
    assert len(results.tables({'a': [seed_of(0)], 'b': [other]})) == 2
    assert len(results.tables({'a': [seed_of(0)], 'b': [seed_of(0)]})) == 1


def test_csv_and_latex():
    tables = results.tables({'': [seed_of(0), seed_of(1, hydra=-0.02)]})
    lines = [line.split(',') for line in formats.as_csv(tables).splitlines()]
    assert lines[0][:7] == [
        'network',
        'density',
        'kept',
        'prunable',
        'clean %',
        'clean std',
        'clean n',
    ]
    assert [line[0] for line in lines[1:5]] == ['pretrain', 'lwm_0.1', 'hydra_0.1', 'hydra - lwm']
    assert float(lines[3][4]) == pytest.approx(89) and lines[3][6] == '2'
    tex = formats.latex(tables)
    assert r'LWM & 0.1 & 200 / 2,000 & \textbf{90.0 $\pm$ 0.0} & 80.0 $\pm$ 0.0 \\' in tex
    assert r'HYDRA $-$ LWM & 0.1 &  & $-$1.0 $\pm$ 1.4 & $+$5.0 $\pm$ 0.0 \\' in tex
    rules = ['toprule', 'midrule', 'addlinespace', 'addlinespace', 'bottomrule']
    assert re.findall('(.+rule|addlinespace)', tex.replace('\\', '')) == rules


def test_the_steps_of_the_standard_attack():
    result = a_result()
    after = {'clean': 0.9, 'apgd-ce': 0.6, 'square': 0.5}
    standard = {'accuracy': 0.5, 'examples': 400, 'eps': 0.1, 'norm': 'linf', 'after': after}
    result['networks'][4]['robust']['standard'] = standard
    (table,) = results.tables({'': [result]}, steps=True)
    assert table.titles == ['clean', '+ apgd-ce', '+ square']
    assert [cell.mean for cell in table.blocks[0].rows[2].cells] == [90, 60, 50]
    assert 'standard attack %' in report.table(result)
    assert results.tables({'': [a_result()]}, steps=True) == []


def test_seeds_and_recipes_on_one_page(tmp_path):
    runs = [
        a_run(tmp_path / 'a', seed_of(0)),
        a_run(tmp_path / 'b', seed_of(1, hydra=0.02)),
        a_run(tmp_path / 'c', seed_of(0), objective='pgd'),
    ]
    shutil.rmtree(runs[2] / 'export')
    path = report.combine([read(run) for run in runs], tmp_path / 'out')
    page = path.read_text()
    assert '2 experiments, 3 runs' in page and '91.0<span> ± 1.4</span>' in page
    assert '<th scope="row">objective</th><td>trades</td><td>pgd</td>' in page
    drawn = Counter(figure.parent.name for figure in path.parent.glob('*/*.svg'))
    assert drawn == {'mnist_model_digits_trades': len(FIGURES), 'mnist_model_digits_pgd': 2}
    assert len(embedded(page)) == len(FIGURES) + 2


def test_what_is_one_experiment(tmp_path):
    runs = [a_run(tmp_path / 'a', seed_of(0)), a_run(tmp_path / 'b', seed_of(0), log_every=7)]
    (one,), _ = experiments([read(run) for run in runs])  # that field changes no weight
    assert len(one.runs) == 1
    (runs[1] / 'config.json').unlink()
    # Without its config nothing says that it is the same recipe.
    found, _ = experiments([read(run) for run in runs])
    assert len(found) == 2


def test_parts_of_one_run(tmp_path):
    """Two densities, made on two machines: both folders named, or copied together."""
    result = a_result()
    dense, sparse = (
        a_run(tmp_path / str(density), result | {'networks': [
            x for x in result['networks'] if x['density'] in (1.0, density)
        ]})
        for density in (0.1, 0.05)
    )  # fmt: skip
    for folder, other in ((dense, 0.05), (sparse, 0.1)):
        shutil.rmtree(folder / f'density_{other}')
    (one,), notes = experiments([read(dense), read(sparse)])
    assert rows_of(*one.results) == rows_of(result)
    assert one.densities == [0.1, 0.05] and len(one.runs[0].weights) == 5
    assert notes == [
        f'{sparse}: part of the run in {dense}, same recipe and seed 3: reported as one'
    ]

    shutil.copytree(sparse, dense, dirs_exist_ok=True)
    page = report.write(dense).read_text()
    assert len(embedded(page)) == len(FIGURES) - 1  # accuracies of one density only
    assert '<li>density_0.1/hydra/finetune: hydra_0.1 is not in result.json' in page


def test_results_of_another_version(workdir):
    result = a_result() | {'versions': {'robustprune_jax': '0.0.7'}, 'seconds': 'long'}
    result['networks'][1]['robust'] = 0.5
    result['networks'].append('a network')
    (workdir / 'result.json').write_text(json.dumps(result))
    shutil.rmtree(workdir / 'export')
    page = report.write(workdir).read_text()
    assert '<li>result.json: written by robustprune_jax 0.0.7, read by ' in page
    assert '<li>result.json: not the entry of a network: &#x27;lwm_0.05&#x27;' in page
    assert '<li>result.json: not the entry of a network: &#x27;a network&#x27;' in page
    assert '<td class=best>85.0</td>' in page  # and goes on with the others


@pytest.mark.parametrize('content', ['[1]', '{"seed": 3, "pretrain": 5}', '{'])
def test_no_usable_config(workdir, content):
    (workdir / 'config.json').write_text(content)
    assert read(workdir).notes[0].startswith('config.json: not the config of a run')


# --- version 0.1 ------------------------------------------------------------------------------


def as_version_0_1(run, baseline='lwm', score_init='scaled', **lwm):
    """Makes of a run what version 0.1 would have written, its LWM under the name `baseline`."""
    config = json.loads((run / 'config.json').read_text())
    config['lwm'] = {'epochs': 20, 'score_init': score_init, **lwm}
    (run / 'config.json').write_text(json.dumps(config))
    result = json.loads((run / 'result.json').read_text())
    for entry in result['networks']:
        density, old = entry['density'], entry['name'].replace('lwm', baseline)
        if entry['phase'] == 'prune':
            old = f'pruned_{density}'
        exports = run / 'export'
        (exports / f'{entry["name"]}.pth.tar').rename(exports / f'{old}.pth.tar')
        entry['name'] = old
        for field in ('method', 'phase', 'title', 'layers'):
            del entry[field]
    (run / 'result.json').write_text(json.dumps(result))
    for folder in run.glob('density_*'):
        (folder / 'hydra/prune').rename(folder / 'prune')
        (folder / 'hydra/finetune').rename(folder / 'finetune')
        (folder / 'lwm').rename(folder / 'its')
        (folder / 'its/finetune').rename(folder / 'lwm')
    return run


def with_pruned():
    result = a_result()
    result['networks'].append(network(Part('prune', 'hydra', 0.1), 0.5, 0.5))
    return result


def test_a_run_of_version_0_1(tmp_path):
    today = read(a_run(tmp_path / 'today', with_pruned()))
    earlier = read(as_version_0_1(a_run(tmp_path / 'earlier', with_pruned())))
    one, other = (rows_of(run.result) for run in (today, earlier))
    assert [row[1:] for row in one] == [row[1:] for row in other]
    assert [row.name for row in other][1:5] == ['lwm_0.1', 'pruned_0.1', 'hydra_0.1', 'hydra - lwm']
    assert earlier.notes == [] and earlier.metrics == today.metrics
    assert set(earlier.weights) == set(today.weights) and len(earlier.weights) == 6

    (earlier.workdir / 'density_0.1/lwm/metrics.jsonl').unlink()
    (earlier.workdir / 'result.json').unlink()
    run = read(earlier.workdir)
    assert run.notes[1] == (
        'density_0.1/lwm/metrics.jsonl: no lines, so no training curves of this phase'
    )
    assert set(run.weights) == set(today.weights)


def test_results_of_version_0_1_alone(tmp_path):
    run = as_version_0_1(a_run(tmp_path / 'run', a_result()))
    for folder in ('pretrain', 'density_0.1', 'density_0.05', 'export'):
        shutil.rmtree(run / folder)
    assert report.table(read(run).result) == report.table(a_result())
    assert report.table(json.loads((run / 'result.json').read_text())) == report.table(a_result())


def test_other_baselines_of_version_0_1(tmp_path):
    run = read(as_version_0_1(a_run(tmp_path / 'run', a_result()), 'snip', 'snip'))
    titles = {row.name: row.title for row in rows_of(run.result) if row.density == 0.1}
    assert titles == {'hydra_0.1': 'HYDRA', 'snip_0.1': 'SNIP'}
    assert tuned('snip', 0.1) in run.metrics and tuned('snip', 0.1) in run.weights
    run = as_version_0_1(a_run(tmp_path / 'other', a_result()), 'random', 'xavier_normal')
    assert tuned('random', 0.1) in read(run).metrics


def test_recipes_of_version_0_1_stay_apart(tmp_path):
    """Also by a field that there is no more."""
    runs = [
        as_version_0_1(a_run(tmp_path / str(seed), seed_of(seed)), epochs=epochs)
        for seed, epochs in enumerate((8, 8, 12))
    ]
    found, _ = experiments([read(run) for run in runs])
    assert [len(experiment.runs) for experiment in found] == [2, 1]
    assert fields_apart(found) == {'lwm.epochs': [8, 12]}


# --- the command ------------------------------------------------------------------------------


def test_command(workdir, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp('empty')
    assert command.main([str(empty), str(workdir)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith('error: no run in') and str(empty) in err
    assert 'hydra - lwm' in out and str(workdir / 'report' / 'index.html') in out


def test_command_with_one_page(workdir, tmp_path, capsys):
    other = a_run(tmp_path / 'other', seed_of(4), objective='pgd')
    for folder in (workdir, other):
        shutil.rmtree(folder / 'export')
    assert command.main([str(workdir), str(other), '--out', str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    assert "  objective: 'trades' | 'pgd'" in out
    assert out.splitlines()[-1] == str(tmp_path / 'out' / 'index.html')
    assert not (workdir / 'report').exists()


def test_importing_the_report_does_not_import_jax():
    code = 'import sys, robustprune_jax.report; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
