"""The report: the table's numbers by hand, pages from whole, partial and damaged runs."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conversion import save_pth
from robustprune_jax import report
from robustprune_jax.report import __main__ as command
from robustprune_jax.report import figures, results
from robustprune_jax.report.run import PHASES, Run, read

PNG = b'\x89PNG\r\n'


def network(name, density, kept, clean, pgd, **robust):
    entry = {'accuracy': pgd, 'examples': 400, 'eps': 0.1, 'steps': 20, 'norm': 'linf'}
    return {
        'name': name,
        'density': density,
        'kept': kept,
        'prunable': 2000,
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
            network('hydra_0.05', 0.05, 100, 0.9, 0.8),
            network('lwm_0.05', 0.05, 100, 0.875, 0.8125),
            network('pretrain', 1.0, 2000, 0.95, 0.9),
            network('lwm_0.1', 0.1, 200, 0.9, 0.8),
            network('hydra_0.1', 0.1, 200, 0.9, 0.85),
        ],
    }


@pytest.fixture
def workdir(tmp_path):
    """A finished run at two densities, as the files of a run have it."""
    for part in ['pretrain', *(f'density_{d}/{p}' for d in (0.1, 0.05) for p in PHASES)]:
        folder = tmp_path / part
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
    for entry in a_result()['networks']:
        state = {f'layer{i}.weight': k * (k > 2 - entry['density']) for i, k in enumerate(kernels)}
        state['layer0.bias'] = np.ones(50, np.float32)
        checkpoint = {'arch': 'mnist_model', 'state_dict': state}
        save_pth(tmp_path / 'export' / f'{entry["name"]}.pth.tar', checkpoint)
    (tmp_path / 'result.json').write_text(json.dumps(a_result()))
    return tmp_path


# --- the table --------------------------------------------------------------------------------


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


def test_the_better_of_a_pair_is_marked():
    best = {row.name: row.best for row in results.rows(a_result()) if not row.delta}
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
            'pruned_0.1', 0.1, 200, 0.7, 0.6,
            ibp={'accuracy': 0.5, 'eps': 0.1, 'norm': 'linf', 'examples': 400},
            smooth={**smooth, 'certified_accuracy': certified},
        )
    )  # fmt: skip
    columns = results.columns(result)
    titles = ['clean', 'PGD-20', 'IBP', 'smooth r=0.25', 'smooth r=0.5']
    assert [column.title for column in columns] == titles
    assert columns[2].values == {'pruned_0.1': 0.5}
    assert columns[4].settings == 'sigma 0.25, alpha 0.001, 1,000 samples, 100 images'
    names = [row.name for row in results.rows(result)]
    assert names[1:5] == ['lwm_0.1', 'pruned_0.1', 'hydra_0.1', 'hydra - lwm']
    # The 100 images of smoothing: 1.96 * sqrt(0.5 * 0.5 / 100).
    assert results.notes(result)[-1].startswith('95 % confidence intervals reach at most 9.8 ')
    lines = report.table(result).splitlines()
    assert lines[4].split()[-5:] == ['70.0', '60.0', '50.0', '75.0', '50.0']
    assert lines[3].split()[-2:] == ['90.0', '80.0']  # nothing where it was not evaluated


def test_table_of_an_unfinished_run():
    assert report.table({}) == 'No network has been evaluated yet.'
    text = report.table({'networks': [{'name': 'hydra_0.1', 'density': 0.1}]})
    assert text.splitlines()[2].split() == ['hydra_0.1', '0.1']


# --- the page ---------------------------------------------------------------------------------


def embedded(page):
    return [base64.b64decode(data) for data in re.findall('data:image/png;base64,([^"]+)"', page)]


def test_page_of_a_whole_run(workdir):
    path = report.write(str(workdir))
    assert path == workdir / 'report' / 'index.html'
    page = path.read_text()
    files = ['accuracy_by_density.png', 'training.png', 'weights_0.05.png', 'weights_0.1.png']
    assert sorted(p.name for p in path.parent.iterdir()) == [*files[:1], 'index.html', *files[1:]]
    written = [(path.parent / file).read_bytes() for file in files]
    assert sorted(embedded(page)) == sorted(written)
    assert all(image.startswith(PNG) for image in written)
    assert '&lt;digits&gt;' in page and '<digits>' not in page
    assert '2 min 5 s' in page and 'jax 0.10.2' in page
    assert '<td class=best>85.0</td>' in page and '−1.2' in page
    assert 'Missing from this report' not in page
    # Nothing to fetch: no address but the embedded data.
    assert re.findall(r'(?:src|href)="(?!data:)|https?://|@import|url\(', page) == []


def test_reading_leaves_out_a_cut_line_and_what_is_no_kernel(workdir):
    run = read(workdir)
    assert [line['step'] for line in run.metrics['pretrain']] == [5, 5, 10, 10]
    assert list(run.weights['hydra_0.1']) == [f'layer{i}' for i in range(2)]
    assert run.densities == ['0.1', '0.05'] and run.missing == []


def test_missing_parts_are_named(workdir):
    (workdir / 'density_0.1' / 'lwm' / 'metrics.jsonl').unlink()
    (workdir / 'density_0.05' / 'prune' / 'metrics.jsonl').write_text('{"st')
    (workdir / 'density_0.1' / 'prune' / 'metrics.jsonl').write_text('no JSON\n')
    (workdir / 'export' / 'lwm_0.05.pth.tar').unlink()
    (workdir / 'export' / 'hydra_0.1.pth.tar').write_bytes(b'PK no zip')
    page = report.write(workdir).read_text()
    for text in (
        'density_0.1/lwm/metrics.jsonl: no lines',
        'density_0.05/prune/metrics.jsonl: no lines',
        'density_0.1/prune/metrics.jsonl: not a log',
        'export/lwm_0.05.pth.tar: not there',
        'export/hydra_0.1.pth.tar: not an exported network',
    ):
        assert f'<li>{text}' in page
    assert len(embedded(page)) == 4  # each density has one network left to compare


@pytest.mark.parametrize('content', [None, '{"networks": 3}', '[]', '{"networks": [{}]}', '{'])
def test_no_usable_result(workdir, content):
    path = workdir / 'result.json'
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    page = report.write(workdir).read_text()
    assert '<li>result.json: not the' in page
    assert len(embedded(page)) == 1 and '<h2>Training</h2>' in page


def test_result_alone(tmp_path):
    (tmp_path / 'result.json').write_text(json.dumps(a_result()))
    page = report.write(tmp_path).read_text()
    assert len(embedded(page)) == 1 and '<h2>Accuracy against density</h2>' in page
    assert '<li>pretrain/metrics.jsonl: no lines' in page


def test_one_density_has_no_figure_over_densities(workdir):
    result = a_result()
    result['networks'] = [n for n in result['networks'] if n['density'] != 0.05]
    (workdir / 'result.json').write_text(json.dumps(result))
    assert '<h2>Accuracy against density</h2>' not in report.write(workdir).read_text()


def test_deep_networks_show_some_of_their_layers():
    layers = {f'layer{i}': np.arange(6.0).reshape(2, 3) for i in range(40)}
    weights = {'pretrain': layers, 'lwm_0.1': layers}
    run = Run(Path('.'), {'networks': []}, {}, weights, {}, [])
    caption = figures.histograms(run, '0.1').caption
    assert caption.endswith('12 of 40 layers, evenly spaced.')


def test_networks_of_other_shapes_are_not_compared(workdir):
    other = {'state_dict': {'layer0.weight': np.ones((2, 2), np.float32)}}
    save_pth(workdir / 'export' / 'pretrain.pth.tar', other)
    assert '<h2>Weights' not in report.write(workdir).read_text()


def test_no_run(tmp_path):
    (tmp_path / 'photos').mkdir()
    with pytest.raises(FileNotFoundError, match='no run in'):
        report.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['photos']


# --- the command ------------------------------------------------------------------------------


def test_command(workdir, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp('empty')
    assert command.main([str(empty), str(workdir)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith('error: no run in') and str(empty) in err
    assert 'hydra - lwm' in out and str(workdir / 'report' / 'index.html') in out


def test_importing_the_report_does_not_import_jax():
    code = 'import sys, robustprune_jax.report; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
