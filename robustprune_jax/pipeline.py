"""The whole job: one pretrained network, pruned to each density, beside the LWM baseline."""

import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen
from ml_collections import ConfigDict

from conversion.to_torch import export_checkpoint
from robustprune_jax import config as configs
from robustprune_jax import report, rules, zoo
from robustprune_jax.data import Splits, load
from robustprune_jax.evaluation.evaluate import evaluate
from robustprune_jax.models import create_model
from robustprune_jax.pruning.masks import SCORE_INITS
from robustprune_jax.runtime import distributed
from robustprune_jax.runtime.files import write_atomically
from robustprune_jax.training import checkpoint
from robustprune_jax.training import loop as phase

# phase -> the phase whose network it starts from
SOURCE = {'prune': 'pretrain', 'finetune': 'prune', 'lwm': 'pretrain'}

# phase -> the name of the network that it ends with, without the density
NETWORK = {'pretrain': 'pretrain', 'prune': 'pruned', 'finetune': 'hydra', 'lwm': 'lwm'}
# lwm's, by its scores: only 'scaled' ones choose the largest weights
BASELINE = {'scaled': 'lwm', 'snip': 'snip'} | {
    name: 'random' for name in SCORE_INITS if name != 'scaled'
}

PACKAGES = ('robustprune_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def run(config: ConfigDict, workdir: Path | str) -> dict:
    """Runs config.phases in `workdir` and returns what its result.json then holds.

    A phase that is finished is not redone, an interrupted one goes on. Every finished network is
    exported and, when 'evaluate' is among the phases, evaluated; then the report is written.
    Raises ValueError or FileNotFoundError, before any training, on a config, data, source or
    workdir that do not fit together; FloatingPointError when training diverges.
    """
    started, workdir = time.monotonic(), Path(workdir)
    with distributed.together():
        rules.check(config)
    distributed.agree({'config': json.loads(config.to_json()), 'workdir': str(workdir)})
    wanted = configs.phases(config)
    with distributed.together():
        splits = load(config.dataset)
        module = create_model(config.arch, config.dataset.num_classes)
        _check_images(config, module, splits)
        _check_claim(config, workdir)
    parts = ('train', 'validation', 'test')
    distributed.agree({f'{part} images': len(getattr(splits, part).labels) for part in parts})
    _claim(config, workdir)
    _check_sources(config, wanted, splits, workdir)

    for name in wanted:
        if name == 'evaluate':
            continue
        for density in [None] if name == 'pretrain' else config.densities:
            directory = _folder(workdir, name, density)
            if checkpoint.is_finished(directory):
                continue
            if name == 'pretrain':
                variables = _initial_variables(config, module, splits)
                if not config.pretrain.epochs:  # the random network is the pretrained one
                    meta = phase.meta(config, name, None, splits)
                    checkpoint.save_network(directory / 'checkpoints', variables, meta)
                    continue
            else:
                source, _ = checkpoint.load(_source(config, wanted, name, density, workdir))
                variables = phase.start_variables(config, name, density, source, module, splits)
            phase.train(config, name, density, module, variables, splits, directory)

    writes = jax.process_index() == 0
    result = _read_result(config, workdir)
    earlier = result['seconds']
    for name, path in _networks(config, wanted, workdir).items():
        variables, meta = checkpoint.load(path, config.evaluate.checkpoint)
        export = workdir / 'export' / f'{name}.pth.tar'
        if writes:
            export.parent.mkdir(exist_ok=True)
            export_checkpoint(variables, meta, export)
        if 'evaluate' in wanted:
            entry = evaluate(config, name, module, variables, splits.test, workdir)
            entry['density'] = meta['density'] or 1.0
            entry['checkpoint'] = os.path.relpath(path, workdir)
            entry['export'] = os.path.relpath(export, workdir)
            others = [network for network in result['networks'] if network['name'] != name]
            result['networks'] = [*others, entry]
            if writes:
                card = json.dumps(zoo.card(config, entry), indent=1) + '\n'
                write_atomically(export.with_name(f'{name}.json'), card)
        result['seconds'] = round(earlier + time.monotonic() - started, 1)
        if writes:
            write_atomically(workdir / 'result.json', json.dumps(result, indent=1) + '\n')
    with distributed.together():  # a process that leaves earlier would wait for the others to end
        if writes:
            page = report.write(workdir)
            print(report.table(result), f'\nreport: {page}', flush=True)
    return result


def _check_images(config, module, splits):
    if not len(splits.validation.labels) and config.evaluate.checkpoint == 'best':
        raise ValueError('config.evaluate.checkpoint=best needs config.dataset.validation above 0')
    jax.eval_shape(lambda: _initial_variables(config, module, splits))


def _initial_variables(config, module: linen.Module, splits: Splits) -> dict:
    images = jnp.zeros((1, *splits.train.images.shape[1:]))
    return module.init(phase.phase_key(config.seed, 'pretrain', 'init'), images)


def _check_claim(config, workdir):
    """Refuses a workdir of another experiment."""
    path = workdir / 'config.json'
    if path.exists():
        # A version that adds a field gives it the default under which older runs were made.
        saved = configs.completed(json.loads(path.read_text()), configs.identity(configs.default()))
        found = '; '.join(configs.differences(saved, configs.identity(config)))
        if found:
            raise ValueError(
                f'{workdir} holds another experiment (there, here): {found}; choose a new --workdir'
            )


def _claim(config, workdir):
    """Writes config.json; refuses a workdir that is not the same folder on every host."""
    path = workdir / 'config.json'
    with distributed.together():
        if jax.process_index() == 0:
            write_atomically(path, config.to_json(indent=1) + '\n')
    with distributed.together():
        if not path.exists():
            raise FileNotFoundError(f'no {path}: --workdir must be a folder that all hosts share')


def _folder(workdir: Path, name: str, density: float | None) -> Path:
    return workdir / name if density is None else workdir / f'density_{density:g}' / name


def _source(config, wanted, name: str, density: float, workdir: Path) -> Path:
    """Where the network is that phase `name` starts from: config.source, or in the workdir."""
    before = SOURCE[name]
    if config.source and SOURCE.get(wanted[0]) == before:
        return Path(config.source)
    return _folder(workdir, before, None if before == 'pretrain' else density)


def _check_sources(config, wanted, splits, workdir):
    """Every phase's source is there, or will be made by an earlier phase, and fits."""
    if config.source and 'pretrain' in wanted:
        raise ValueError(
            'config.source is given, and pretrain is among config.phases: it starts from scratch'
        )
    if config.source and wanted == ['evaluate']:
        _check_source(config, splits, Path(config.source), None, None)
    for name in wanted:
        if name not in SOURCE:
            continue
        for density in config.densities:
            path = _source(config, wanted, name, density, workdir)
            if path == Path(config.source) or SOURCE[name] not in wanted:
                _check_source(config, splits, path, name, density)


def _check_source(config, splits, path, name, density):
    try:
        meta = checkpoint.load_meta(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}; or add the phase to config.phases') from None
    expected = {
        'arch': config.arch,
        'num_classes': config.dataset.num_classes,
        'image_shape': list(splits.train.images.shape[1:]),
    }
    if name is not None:
        expected['phase'] = SOURCE[name]
    if name == 'finetune':
        expected['density'] = density
    found = {field: meta.get(field) for field in expected}
    wrong = '; '.join(configs.differences(found, expected))
    if wrong:
        raise ValueError(
            f'the checkpoint {path} does not fit {name or "evaluate"} (found, expected): {wrong}'
        )


def _networks(config, wanted, workdir) -> dict[str, Path]:
    """The finished networks by name, in the order of the table."""
    if config.source and wanted == ['evaluate']:
        meta = checkpoint.load_meta(config.source)
        suffix = '' if meta['density'] is None else f'_{meta["density"]:g}'
        return {NETWORK[meta['phase']] + suffix: Path(config.source)}
    folders = {'pretrain': _folder(workdir, 'pretrain', None)}
    for density in config.densities:
        for name in ('prune', 'finetune', 'lwm') if config.evaluate.pruned else ('finetune', 'lwm'):
            kind = BASELINE[config.lwm.score_init] if name == 'lwm' else NETWORK[name]
            folders[f'{kind}_{density:g}'] = _folder(workdir, name, density)
    return {name: path for name, path in folders.items() if checkpoint.is_finished(path)}


def _read_result(config, workdir) -> dict:
    """result.json so far, or a new one."""
    path = workdir / 'result.json'
    old = json.loads(path.read_text()) if path.exists() else {'seconds': 0.0, 'networks': []}
    return {
        'arch': config.arch,
        'dataset': config.dataset.name,
        'objective': config.objective,
        'seed': config.seed,
        'seconds': old['seconds'],
        'versions': {name: version(name) for name in PACKAGES},
        'networks': old['networks'],
    }
