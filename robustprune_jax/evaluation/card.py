"""What a network is, and how far it can be trusted: JSON in the shape of RobustBench's."""

import subprocess
from pathlib import Path

from ml_collections import ConfigDict

from robustprune_jax.config import identity, objective_name


def card(config: ConfigDict, entry: dict) -> dict:
    """Returns the card of a network from its entry in result.json and the config of its run.

    RobustBench's fields: name, dataset, architecture, eps (text), clean_acc, reported (under PGD)
    and autoattack_acc (under the standard ensemble, None where it was not run), in percent, as
    text. Ours: threat, evaluations (the entry's `robust`), method, density, kept, effective (None
    where the network's wiring is unknown), prunable, size, seed, objective, commit (of this
    project's checkout, None elsewhere) and config.
    """
    robust = entry['robust']
    name = f'{config.dataset.name}_{config.arch}_{config.objective}_{entry["name"]}'
    return {
        'name': name,
        'dataset': config.dataset.name,
        'architecture': config.arch,
        'threat': robust['pgd']['norm'].capitalize(),
        'eps': f'{robust["pgd"]["eps"]:g}',
        'clean_acc': _percent(entry['clean_accuracy']),
        'reported': _percent(robust['pgd']['accuracy']),
        'autoattack_acc': _percent(robust['standard']['accuracy'])
        if 'standard' in robust
        else None,
        'additional_data': bool(config.dataset.pseudo_labelled),
        'examples': entry['examples'],
        'evaluations': robust,
        'method': entry['method'],
        'density': entry['density'],
        'kept': entry['kept'],
        'effective': entry.get('effective'),
        'prunable': entry['prunable'],
        'size': entry['size'],
        'objective': objective_name(config, 'pretrain'),
        'seed': config.seed,
        'commit': _commit(),
        'config': identity(config),
    }


def _percent(accuracy):
    return f'{100 * accuracy:.2f}'


def _commit():
    here = Path(__file__).parent
    for command in (['ls-files', '--error-unmatch', Path(__file__).name], ['rev-parse', 'HEAD']):
        try:
            git = subprocess.run(
                ['git', '-C', here, *command], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None  # installed without its repository
    return git.stdout.strip()
