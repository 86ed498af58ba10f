"""The table, its numbers by hand."""

from written_runs import a_result, a_run, network, rows_of, with_rank

from robustprune_jax import report
from robustprune_jax.config.parts import Part
from robustprune_jax.report import columns


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
