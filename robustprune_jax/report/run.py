"""The files of a run, read as far as they are there."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustprune_jax import config as configs
from robustprune_jax.report.formats import text
from robustprune_jax.report.results import tables
from robustprune_jax.runtime.files import read_jsonl

# part of a density -> the kind of network that it ends with
# phase -> the kinds of network that it may end with
PHASES = {'prune': ['pruned'], 'finetune': ['hydra'], 'lwm': ['lwm', 'snip', 'random']}


class Run(NamedTuple):
    """What a workdir holds.

    recipe: the fields of its config that decide over trained weights, without the seed, None where
    there is no config; result: result.json, without networks if it is not there; metrics: part
    ('pretrain', 'density_0.1/prune', ...) -> lines of its metrics.jsonl; weights: network ->
    {layer: kernel of 2 or 4 dimensions, as PyTorch has it}; radii: network -> the certified radius
    of each image that smoothing saw, 0 where its prediction is wrong; notes: a sentence for each
    file that should be there and is not, cannot be read, or is of another version.
    """

    workdir: Path
    recipe: dict | None
    result: dict
    metrics: dict[str, list[dict]]
    weights: dict[str, dict[str, np.ndarray]]
    radii: dict[str, np.ndarray]
    notes: list[str]

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
    notes: list[str] = []
    recipe, seed = _config(workdir, notes)
    result = _result(workdir, notes) | ({} if recipe is None else {'seed': seed})
    evaluated = [network['name'] for network in result['networks']]
    notes += [
        f'{part}: {_networks_of(part)[0]} is not in result.json; once it is trained, the command '
        'of this run with --config.phases=evaluate adds it'
        for part in begun
        if evaluated
        and not part.endswith('/prune')
        and not set(_networks_of(part)) & set(evaluated)
    ]
    exported = [x.name.removesuffix('.pth.tar') for x in sorted(workdir.glob('export/*.pth.tar'))]
    names = list(dict.fromkeys([*evaluated, *exported]))
    parts = dict.fromkeys([*begun, *(part for name in evaluated for part in _parts_of(name))])
    if recipe and not recipe['pretrain']['epochs']:
        parts.pop('pretrain', None)  # the network is as it was drawn: there are no lines
    if not begun and not exported:
        notes.append('result.json: alone here, so no training curves and no figures of weights')
        names, parts = [], {}
    metrics = {part: _metrics(workdir, part, notes) for part in parts}
    weights = {name: _weights(workdir, name, notes) for name in names}
    radii = {name: _radii(workdir, name, notes) for name in evaluated}  # others may be unfinished
    return Run(
        workdir,
        recipe,
        result,
        {part: lines for part, lines in metrics.items() if lines},
        {name: layers for name, layers in weights.items() if layers},
        {name: values for name, values in radii.items() if len(values)},
        notes,
    )


def _config(workdir: Path, notes: list[str]) -> tuple[dict | None, int | None]:
    """Returns the recipe and the seed of config.json."""
    try:
        saved = json.loads((workdir / 'config.json').read_text())
        # A config from before a field existed means its default.
        recipe = configs.completed(saved, configs.identity(configs.default()))
        return recipe, recipe.pop('seed')
    except FileNotFoundError:
        notes.append('config.json: not there, so this run is compared with no other seed')
    except (ValueError, TypeError, AttributeError) as error:
        notes.append(f'config.json: not the config of a run ({type(error).__name__}: {error})')
    return None, None


def _result(workdir: Path, notes: list[str]) -> dict:
    """Returns result.json with the networks that can be understood, none if it is no such file."""
    result, networks = {}, []
    try:
        result = json.loads((workdir / 'result.json').read_text())
        networks = list(result['networks'])
    except FileNotFoundError:
        notes.append('result.json: not there, so nothing has been evaluated yet')
    except (ValueError, TypeError, KeyError) as error:
        notes.append(f'result.json: not the result of a run ({type(error).__name__}: {error})')
    result = result if isinstance(result, dict) else {}
    written, ours = _version(result), version('robustprune_jax')
    if written not in (None, ours):
        notes.append(
            f'result.json: written by robustprune_jax {written}, read by {ours}; what {ours} does '
            'not know is left out'
        )
    understood = []
    for network in networks:
        try:
            text(tables({'': [{'networks': [network]}]}))
            understood.append(network)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            name = network.get('name') if isinstance(network, dict) else network
            problem = f'{type(error).__name__}: {error}'
            notes.append(f'result.json: not the entry of a network: {name!r} ({problem})')
    return {**result, 'networks': understood}


def _version(result: dict) -> str | None:
    """Returns the version that wrote a result, None if it does not say."""
    versions = result.get('versions')
    return versions.get('robustprune_jax') if isinstance(versions, dict) else None


def _density_parts(workdir: Path) -> list[str]:
    """Returns the folders of the phases after pretraining."""
    folders = [folder for phase in PHASES for folder in workdir.glob(f'density_*/{phase}')]
    return sorted(str(folder.relative_to(workdir)) for folder in folders)


def _networks_of(part: str) -> list[str]:
    """Returns the networks of which one is what a part of a run ends with."""
    density, _, phase = part.removeprefix('density_').rpartition('/')
    return [f'{kind}_{density}' for kind in PHASES[phase]] if density else [phase]


def _parts_of(network: str) -> list[str]:
    """Returns the parts of a run in which a network was trained, after the one it started from."""
    kind, _, density = network.partition('_')
    if kind == 'pretrain':
        return ['pretrain']
    if kind == 'hydra':
        return [f'density_{density}/{phase}' for phase in ('prune', 'finetune')]
    return [f'density_{density}/{phase}' for phase, kinds in PHASES.items() if kind in kinds]


def _metrics(workdir: Path, part: str, notes: list[str]) -> list[dict]:
    """Returns the lines of a part's metrics.jsonl, [] if there are none."""
    file = f'{part}/metrics.jsonl'
    lines = read_jsonl(workdir / file, lambda sentence: notes.append(f'{part}/{sentence}'))
    if not lines:
        notes.append(f'{file}: no lines, so no training curves of this phase')
    return lines


def _weights(workdir: Path, network: str, notes: list[str]) -> dict[str, np.ndarray]:
    """Returns {layer: kernel} of an exported network, {} if it cannot be read."""
    from conversion import load_pth  # only here: it brings jax, and the table does without

    file = f'export/{network}.pth.tar'
    try:
        state = load_pth(workdir / file)['state_dict']
        kernels = {
            name.removesuffix('.weight'): kernel
            for name, kernel in state.items()
            if name.endswith('.weight') and kernel.ndim in (2, 4)
        }
        wrong = [name for name, x in kernels.items() if not (x.size and np.isfinite(x).all())]
    except FileNotFoundError:
        notes.append(f'{file}: not there, so not in the figures of weights')
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        notes.append(f'{file}: not an exported network ({error})')
        return {}
    if wrong:
        notes.append(f'{file}: empty or not finite in {", ".join(wrong)}, so not in the figures')
        return {}
    return kernels


def _radii(workdir: Path, network: str, notes: list[str]) -> np.ndarray:
    """Returns a network's certified radii, [] if smoothing was not evaluated."""
    file = f'examples/{network}.smooth.jsonl'
    try:
        lines = read_jsonl(workdir / file, lambda x: notes.append(f'examples/{x}'))[1:]
        return np.array([float(x['radius']) * (x['label'] == x['prediction']) for x in lines])
    except (ValueError, TypeError, KeyError) as error:
        notes.append(f'{file}: no lines of certified radii ({type(error).__name__}: {error})')
        return np.array([])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
