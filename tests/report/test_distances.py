"""What the report makes of distances, and of attacks that disagree."""

import json

import numpy as np
from written_runs import a_result, tuned

from robustprune_jax import report
from robustprune_jax.report.run import read


def with_distances():
    """An ensemble that breaks 6 points more than PGD and 2 more than FMN of one network, of another
    as much, and distances of four images each."""
    result = a_result()
    ball = {'examples': 400, 'eps': 0.1, 'norm': 'linf'}
    measured = {'steps': 100, 'norm': 'linf', 'loss': 'margin', 'examples': 400}
    for entry, ensemble, far in (
        (result['networks'][0], 0.74, 0.76),
        (result['networks'][1], 0.8125, 0.8),
    ):
        distances = measured | {'accuracy_at': {'0.05': 0.875, '0.1': far}, 'median': 0.2}
        standard = ball | {'accuracy': ensemble, 'after': {'clean': 0.9, 'square': ensemble}}
        entry['robust'] |= {'standard': standard, 'distances': distances}
    return result


def test_a_sentence_where_attacks_disagree():
    table = report.table(with_distances()).splitlines()
    assert table[0].endswith('PGD-20 %  standard attack %  FMN-100 eps=0.05 %  FMN-100 eps=0.1 %')
    sentences = [line for line in table if line.startswith('The ensemble leaves less')]
    assert [line.partition(' (')[0] for line in sentences] == [
        'The ensemble leaves less than PGD',
        'The ensemble leaves less than FMN',
    ]
    assert [line.rpartition(': ')[2] for line in sentences] == [
        'hydra_0.05 6.0.',
        'hydra_0.05 2.0.',
    ]
    assert 'FMN-100 eps=0.05, FMN-100 eps=0.1: l_inf, loss margin, 400 images.' in table
    assert 'The ensemble leaves less' not in report.table(a_result())


def test_curves_of_distances(workdir):
    (workdir / 'result.json').write_text(json.dumps(with_distances()))
    (workdir / 'examples').mkdir()
    for name in ('hydra_0.05', 'lwm_0.05'):
        lines = [{'norm': 'linf'}, *({'index': i, 'distance': i / 10} for i in range(3))]
        lines.append({'index': 3, 'distance': np.inf})
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (workdir / 'examples' / f'{name}.distances.jsonl').write_text(text)
    run = read(workdir)
    np.testing.assert_array_equal(run.distances[tuned('hydra', 0.05)], [0, 0.1, 0.2, np.inf])
    page = report.write(workdir).read_text()
    assert 'Accuracy against the size of the perturbation' in page
    assert 'The ensemble leaves less than PGD' in page
    assert (workdir / 'report' / 'security.png').read_bytes().startswith(b'\x89PNG\r\n')
