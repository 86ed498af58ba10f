"""Many runs beside each other: seeds, recipes, parts of one run."""

import json
import re
import shutil
from collections import Counter

import pytest
from written_runs import FIGURES, a_result, a_run, embedded, rows_of, seed_of

from robustprune_jax import report
from robustprune_jax.report import formats, results
from robustprune_jax.report.experiments import experiments
from robustprune_jax.report.run import read


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
