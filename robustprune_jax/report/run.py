"""The files of a run, read as far as they are there."""

import contextlib
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustprune_jax import config as configs
from robustprune_jax.config.parts import Part
from robustprune_jax.report import earlier
from robustprune_jax.report.formats import text
from robustprune_jax.report.networks import part_of
from robustprune_jax.report.results import tables
from robustprune_jax.runtime.files import read_jsonl


class Run(NamedTuple):
    """What a workdir holds.

    recipe: the fields of its config that decide over trained weights, without the seed, None where
    there is no config; result: result.json, without networks if it is not there; metrics: part ->
    lines of its metrics.jsonl; weights: part -> {layer: kernel of 2 or 4 dimensions, as PyTorch has
    it} of the network that it ended with; radii: part -> the certified radius of each image that
    smoothing saw, 0 where its prediction is wrong; distances: part -> how far from a misclassified
    one FMN found each image that it saw, infinite where it found none; notes: a sentence for each
    file that should be there and is not, cannot be read, or is of another version.
    """

    workdir: Path
    recipe: dict | None
    result: dict
    metrics: dict[Part, list[dict]]
    weights: dict[Part, dict[str, np.ndarray]]
    radii: dict[Part, np.ndarray]
    distances: dict[Part, np.ndarray]
    notes: list[str]

    @property
    def parts(self) -> list[Part]:
        """The parts of which there is a file."""
        return list(dict.fromkeys([*self.metrics, *self.weights, *self.radii, *self.distances]))


def read(workdir: str | os.PathLike) -> Run:
    """Returns the Run in a folder; raises FileNotFoundError if there is none."""
    workdir = Path(workdir)
    notes: list[str] = []
    recipe, seed = _config(workdir, notes)
    begun = _begun(workdir, recipe)
    if not begun and not (workdir / 'result.json').is_file():
        raise FileNotFoundError(f'no run in {workdir}: neither result.json nor any phase')
    result = _result(workdir, notes) | ({} if recipe is None else {'seed': seed})
    evaluated = {network['name']: part_of(network) for network in result['networks']}
    notes += [
        f'{part.folder}: {part.network} is not in result.json; once it is trained, the command '
        'of this run with --config.phases=evaluate adds it'
        for part in begun
        if evaluated and part.phase != 'prune' and part.network not in evaluated
    ]
    parts = evaluated | {part.network: part for part in begun}
    exported = _exported(workdir)
    notes += [
        f'export/{file.name}: of no part of this run, so not in the figures of weights'
        for name, file in exported.items()
        if name not in parts
    ]
    trained = [
        part
        for part in parts.values()  # without epochs the network is as it was drawn: no lines
        if not (recipe and part.phase == 'pretrain' and not recipe['pretrain']['epochs'])
    ]
    shown = [name for name in parts if name in evaluated or name in exported]
    if not begun and not exported:
        notes.append('result.json: alone here, so no training curves and no figures of weights')
        shown, trained = [], []
    metrics = {part: _metrics(workdir, part, notes) for part in trained}
    files = {name: workdir / f'export/{name}.pth.tar' for name in shown} | exported
    weights = {parts[name]: _weights(files[name], notes) for name in shown}
    # Of evaluated networks only: others may be unfinished.
    radii, distances = (
        {part: _per_image(workdir, name, *read, notes) for name, part in evaluated.items()}
        for read in (('smooth', _radius), ('distances', itemgetter('distance')))
    )
    return Run(
        workdir,
        recipe,
        result,
        {part: lines for part, lines in metrics.items() if lines},
        {part: layers for part, layers in weights.items() if layers},
        {part: values for part, values in radii.items() if len(values)},
        {part: values for part, values in distances.items() if len(values)},
        notes,
    )


def _begun(workdir: Path, recipe: dict | None) -> list[Part]:
    """Returns the parts whose folders are there."""
    first = [Part('pretrain')] if (workdir / 'pretrain').is_dir() else []
    # Version 0.1 had one folder less.
    return first + (
        _parts(workdir, 'density_*/*/*', Part.at)
        or _parts(workdir, 'density_*/*', partial(earlier.part, recipe))
    )


def _parts(workdir: Path, pattern: str, at: Callable[[str], Part]) -> list[Part]:
    """Returns the parts whose folders match a pattern."""
    found = []
    for folder in sorted(workdir.glob(pattern)):
        with contextlib.suppress(ValueError):  # it is no part's
            found.append(at(str(folder.relative_to(workdir))))
    return found


def _config(workdir: Path, notes: list[str]) -> tuple[dict | None, int | None]:
    """Returns the recipe and the seed of config.json."""
    try:
        saved = json.loads((workdir / 'config.json').read_text())
        # A field that the config was made without had its default; one that is no more may still
        # be what tells two recipes apart.
        config = configs.default()
        config.update(earlier.config(saved))
        recipe = configs.identity(config)
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
            known = earlier.entry(network)
            text(tables({'': [{'networks': [known]}]}))
            understood.append(known)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            name = network.get('name') if isinstance(network, dict) else network
            problem = f'{type(error).__name__}: {error}'
            notes.append(f'result.json: not the entry of a network: {name!r} ({problem})')
    return {**result, 'networks': understood}


def _version(result: dict) -> str | None:
    """Returns the version that wrote a result, None if it does not say."""
    versions = result.get('versions')
    return versions.get('robustprune_jax') if isinstance(versions, dict) else None


def _metrics(workdir: Path, part: Part, notes: list[str]) -> list[dict]:
    """Returns the lines of a part's metrics.jsonl, [] if there are none."""
    file = f'{part.folder}/metrics.jsonl'
    lines = read_jsonl(workdir / file, lambda sentence: notes.append(f'{part.folder}/{sentence}'))
    if not lines:
        notes.append(f'{file}: no lines, so no training curves of this phase')
    return lines


def _exported(workdir: Path) -> dict[str, Path]:
    """Returns the file of each exported network, of the dense and the sparse one the dense."""
    return {
        file.name.removesuffix(suffix): file
        for suffix in ('.safetensors', '.pth.tar')
        for file in sorted(workdir.glob(f'export/*{suffix}'))
    }


def _weights(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """Returns {layer: kernel} of an exported network's file, {} if it cannot be read."""
    from conversion.files import read_checkpoint  # only here: it brings jax; the table does without

    file = f'export/{path.name}'
    try:
        state, _ = read_checkpoint(path)
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


def _radius(line: dict) -> float:
    return float(line['radius']) * (line['label'] == line['prediction'])


def _per_image(
    workdir: Path, network: str, evaluation: str, value: Callable[[dict], float], notes: list[str]
) -> np.ndarray:
    """Returns a value of each line of an evaluation of a network, [] if there was none."""
    file = f'examples/{network}.{evaluation}.jsonl'
    try:
        lines = read_jsonl(workdir / file, lambda x: notes.append(f'examples/{x}'))[1:]
        return np.array([float(value(line)) for line in lines])
    except (ValueError, TypeError, KeyError) as error:
        notes.append(f'{file}: not the lines of an evaluation ({type(error).__name__}: {error})')
        return np.array([])
