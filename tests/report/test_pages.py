"""Pages and figures, from whole, partial and damaged runs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from written_runs import (
    FIGURES,
    PARTS,
    PNG,
    PRETRAIN,
    TITLES,
    a_result,
    a_run,
    embedded,
    tuned,
    with_rank,
)

from conversion import save_pth
from robustprune_jax import report
from robustprune_jax.config.parts import Part
from robustprune_jax.report.experiments import Experiment
from robustprune_jax.report.figures import style, weights
from robustprune_jax.report.run import Run, read


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
    run = Run(Path('.'), None, {'networks': []}, {}, networks, {}, {}, [])
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
