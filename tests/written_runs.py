"""Runs as their files, for the tests of what reads them."""

import base64
import json
import re

import numpy as np

from conversion import save_pth
from robustprune_jax.config import default
from robustprune_jax.config.parts import Part
from robustprune_jax.report import results

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


def rows_of(*all_results):
    (table,) = results.tables({'': list(all_results)})
    return table.blocks[0].rows


def with_rank():
    """A third method, which is not fine-tuned at 0.05."""
    result = a_result()
    result['networks'] += [
        network(Part('prune', 'rank', 0.05), 0.5, 0.5),
        network(tuned('rank', 0.1), 0.9, 0.875),
    ]
    return result


def seed_of(seed, **shifts):
    """The result of another seed, the clean accuracies of networks shifted."""
    result = a_result() | {'seed': seed}
    for entry in result['networks']:
        entry['clean_accuracy'] += shifts.get(entry['method'], 0)
    return result


def embedded(page):
    images = re.findall('data:image/svg\\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(data) for data in images]
