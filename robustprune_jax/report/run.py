"""The files of a run, read as far as they are there."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustprune_jax.files import read_jsonl

PHASES = ('prune', 'finetune', 'lwm')


class Run(NamedTuple):
    """What a workdir holds.

    result: result.json, without networks if it is not there; metrics: part ('pretrain',
    'density_0.1/prune', ...) -> lines of its metrics.jsonl; weights: network -> {layer: kernel of
    2 or 4 dimensions, as PyTorch has it}; radii: network -> the certified radius of each image that
    smoothing saw, 0 where its prediction is wrong; missing: a sentence for each file that should be
    there and is not, or cannot be read.
    """

    workdir: Path
    result: dict
    metrics: dict[str, list[dict]]
    weights: dict[str, dict[str, np.ndarray]]
    radii: dict[str, np.ndarray]
    missing: list[str]

    @property
    def densities(self) -> list[str]:
        """The densities that were begun, spelled as in file names, densest first."""
        found = {part.split('/')[0].removeprefix('density_') for part in self.metrics}
        found |= {name.partition('_')[2] for name in self.weights}
        return sorted(filter(_is_number, found), key=float, reverse=True)


def read(workdir: str | os.PathLike) -> Run:
    """Returns the Run in a folder; raises FileNotFoundError if there is none."""
    workdir = Path(workdir)
    begun = [
        folder for folder in ('pretrain', *_density_parts(workdir)) if (workdir / folder).is_dir()
    ]
    if not begun and not (workdir / 'result.json').is_file():
        raise FileNotFoundError(f'no run in {workdir}: neither result.json nor any phase')
    missing: list[str] = []
    result = read_result(workdir, missing)
    names = [network['name'] for network in result['networks']]
    parts = dict.fromkeys([*begun, *(part for name in names for part in _parts_of(name))])
    metrics = {part: _metrics(workdir, part, missing) for part in parts}
    weights = {name: _weights(workdir, name, missing) for name in names}
    radii = {name: _radii(workdir, name) for name in names}
    return Run(
        workdir,
        result,
        {part: lines for part, lines in metrics.items() if lines},
        {name: layers for name, layers in weights.items() if layers},
        {name: values for name, values in radii.items() if len(values)},
        missing,
    )


def read_result(workdir: Path, missing: list[str]) -> dict:
    """Returns result.json; one without networks, and a sentence in `missing`, if it is no such
    file."""
    try:
        result = json.loads((workdir / 'result.json').read_text())
        names = [network['name'] for network in result['networks']]
        if all(isinstance(name, str) for name in names):
            return result
        reason = 'networks without names'
    except FileNotFoundError:
        missing.append('result.json: not there, so nothing has been evaluated yet')
        return {'networks': []}
    except (ValueError, TypeError, KeyError) as error:
        reason = f'{type(error).__name__}: {error}'
    missing.append(f'result.json: not the result of a run ({reason})')
    return {'networks': []}


def _density_parts(workdir: Path) -> list[str]:
    """Returns the folders of the phases after pretraining."""
    folders = [folder for phase in PHASES for folder in workdir.glob(f'density_*/{phase}')]
    return sorted(str(folder.relative_to(workdir)) for folder in folders)


def _parts_of(network: str) -> list[str]:
    """Returns the parts of a run in which a network was trained, after the one it started from."""
    kind, _, density = network.partition('_')
    if kind == 'pretrain':
        return ['pretrain']
    phases = {'lwm': ['lwm'], 'pruned': ['prune'], 'hydra': ['prune', 'finetune']}.get(kind, [])
    return [f'density_{density}/{phase}' for phase in phases]


def _metrics(workdir: Path, part: str, missing: list[str]) -> list[dict]:
    """Returns the lines of a part's metrics.jsonl, [] if there are none."""
    file = f'{part}/metrics.jsonl'
    try:
        lines = read_jsonl(workdir / file)
    except ValueError as error:
        missing.append(f'{file}: not a log of lines of JSON ({error})')
        return []
    if not lines:
        missing.append(f'{file}: no lines, so no training curves of this phase')
    return [line for line in lines if isinstance(line, dict)]


def _weights(workdir: Path, network: str, missing: list[str]) -> dict[str, np.ndarray]:
    """Returns {layer: kernel} of an exported network, {} if it cannot be read."""
    from conversion import load_pth  # only here: it brings jax, and the table does without

    file = f'export/{network}.pth.tar'
    try:
        state = load_pth(workdir / file)['state_dict']
    except FileNotFoundError:
        missing.append(f'{file}: not there, so not in the histograms')
        return {}
    except (ValueError, KeyError, OSError) as error:
        missing.append(f'{file}: not an exported network ({error})')
        return {}
    return {
        name.removesuffix('.weight'): kernel
        for name, kernel in state.items()
        if name.endswith('.weight') and kernel.ndim in (2, 4)
    }


def _radii(workdir: Path, network: str) -> np.ndarray:
    """Returns a network's certified radii, [] if smoothing was not evaluated."""
    lines = read_jsonl(workdir / 'examples' / f'{network}.smooth.jsonl')[1:]
    return np.array([x['radius'] * (x['label'] == x['prediction']) for x in lines])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
