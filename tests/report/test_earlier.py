"""Runs of version 0.1, read today."""

import json
import shutil

from written_runs import a_result, a_run, network, rows_of, seed_of, tuned

from robustprune_jax import report
from robustprune_jax.config.parts import Part
from robustprune_jax.report.experiments import experiments, fields_apart
from robustprune_jax.report.run import read


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
