"""The whole job: one pretrained network, pruned by each method to each density."""

import contextlib
import json
import os
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen
from ml_collections import ConfigDict

from conversion.export import FORMATS, check_formats, export
from robustprune_jax import config as configs
from robustprune_jax import report, rules, zoo
from robustprune_jax.config import Part
from robustprune_jax.data import Splits, load
from robustprune_jax.evaluation.evaluate import evaluate
from robustprune_jax.graph.paths import dead_ends
from robustprune_jax.models import create_model
from robustprune_jax.network import dense
from robustprune_jax.pruning import METHODS
from robustprune_jax.runtime import distributed
from robustprune_jax.runtime.files import differences, locked, write_atomically
from robustprune_jax.training import checkpoint
from robustprune_jax.training.loop import check_warmup, train
from robustprune_jax.training.start import (
    check_masks,
    checkpoint_meta,
    phase_key,
    start_variables,
)

PACKAGES = ('robustprune_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def run(config: ConfigDict, workdir: Path | str) -> dict:
    """Runs config.phases in `workdir` and returns what its result.json then holds.

    A phase that is finished is not redone, an interrupted one goes on. Every finished network is
    exported and, when 'evaluate' is among the phases, evaluated; then the report is written. The
    export and card of a network that is measured already, under these settings, stay as they are:
    the card says the commit that measured it.
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
        shapes = _shapes(config, module, splits)
        _check_claim(config, workdir)
        _read_result(config, workdir)
    sizes = {name: len(getattr(splits, name).labels) for name in ('train', 'validation', 'test')}
    distributed.agree({f'{name} images': size for name, size in sizes.items()})
    parts, image_shape = _parts(config, wanted), splits.train.images.shape[1:]
    with distributed.together():
        for part in parts:
            settings = configs.for_method(config, part.method)
            check_warmup(settings, part, splits)
            if part.phase != 'pretrain':
                check_masks(settings, part, module, shapes, image_shape)
        meta = {'arch': config.arch, 'image_shape': image_shape}
        check_formats(module, shapes, meta, configs.names(config.export))
    _check_sources(config, wanted, parts, splits, workdir)
    with _claimed(config, workdir):
        trained = False
        for part in parts:
            trained |= _train_part(config, wanted, part, module, splits, workdir)
        return _evaluate_all(config, wanted, module, splits, workdir, trained, started)


def _parts(config, wanted) -> list[Part]:
    """What is to be trained, every part after the one that it starts from."""
    pretrain = [Part('pretrain')] if 'pretrain' in wanted else []
    return pretrain + [
        Part(phase, method, density)
        for density in config.densities
        for method in configs.methods(config)
        for phase in _phases(method)
        if phase in wanted
    ]


def _phases(method: str) -> tuple[str, ...]:
    return ('prune', 'finetune') if METHODS[method].learned else ('finetune',)


def _train_part(config, wanted, part, module, splits, workdir) -> bool:
    """Trains one part, unless that is done; returns whether it was not."""
    directory, teacher = workdir / part.folder, None
    with distributed.together():
        if jax.process_index() == 0:
            for sentence in checkpoint.set_damaged_aside(directory):
                print(sentence, flush=True)
    if checkpoint.is_finished(directory):
        return False
    if part.phase == 'pretrain':
        variables = _initial_variables(config, module, splits)
        if not config.pretrain.epochs:  # the random network is the pretrained one
            about = checkpoint_meta(config, part, None, splits)
            checkpoint.save_network(directory / 'checkpoints', variables, about)
            return True
    else:
        config = configs.for_method(config, part.method)
        source, _ = checkpoint.load(_source(config, wanted, part, workdir))
        variables = start_variables(config, part, source, module, splits)
        if path := _teacher(config, wanted, part, workdir):
            teacher = dense(checkpoint.load(path)[0])
        if part.phase == 'finetune' and jax.process_index() == 0:
            for sentence in dead_ends(module, variables, splits.train.images.shape[1:]):
                print(f'{part}: {sentence}; another allocation may help.', flush=True)
    train(config, part, module, variables, splits, directory, teacher)
    return True


def _evaluate_all(config, wanted, module, splits, workdir, changed, started):
    """Exports and evaluates the finished networks, writes result.json and the report, as far as
    there is something new; changed: whether there is."""
    writes, formats = jax.process_index() == 0, configs.names(config.export)
    path, folder = workdir / 'result.json', workdir / 'export'
    result = _read_result(config, workdir)
    earlier = result['seconds']
    for name, source in _networks(config, wanted, workdir).items():
        variables, meta = checkpoint.load(source, config.evaluate.checkpoint)
        files = [f'export/{name}{FORMATS[form].suffix}' for form in formats]
        entry, size = None, None
        if 'evaluate' in wanted:
            entry = evaluate(config, name, module, variables, splits.test, workdir)
            entry |= {'method': meta['method'], 'phase': meta['phase'], 'title': _title(meta)}
            entry['density'] = meta['density'] or 1.0
            entry['checkpoint'] = os.path.relpath(source, workdir)
            entry['export'] = next(iter(files), None)
            is_new = _is_new(entry, result, workdir, files)
            if not distributed.exchange(is_new)[0]:  # the first process's word: it writes them
                continue
        if writes:
            folder.mkdir(exist_ok=True)
            size = export(variables, module, meta, folder, name, formats)
        if entry:
            entry['size'] = distributed.exchange(size)[0]
            networks = {network['name']: network for network in result['networks']}
            result['networks'], changed = list((networks | {name: entry}).values()), True
            if writes:
                card = json.dumps(zoo.card(config, entry), indent=1) + '\n'
                write_atomically(folder / f'{name}.json', card)
        if changed:
            result['seconds'] = round(earlier + time.monotonic() - started, 1)
            result['versions'] = {package: version(package) for package in PACKAGES}
            if writes:
                write_atomically(path, json.dumps(result, indent=1) + '\n')
    with distributed.together():  # a process that leaves earlier would wait for the others to end
        if writes:
            print(report.table(result), flush=True)
            page = workdir / 'report' / 'index.html'
            if config.report:
                if changed or not _made_after(page, [path, *workdir.rglob('metrics.jsonl')]):
                    report.write(workdir)
                print(f'report: {page}', flush=True)
    return result


def _is_new(entry, result, workdir, files) -> bool:
    """Whether a network's entry is not in the result, or its card or a file of it is missing, or
    something was measured since its card was written."""
    sizeless = [{k: v for k, v in old.items() if k != 'size'} for old in result['networks']]
    card = workdir / 'export' / f'{entry["name"]}.json'
    measured = workdir.glob(f'examples/{entry["name"]}.*.jsonl')
    there = all((workdir / file).exists() for file in files)
    return not (entry in sizeless and there and _made_after(card, measured))


def _made_after(path: Path, sources: Iterable[Path]) -> bool:
    """Whether a file is there, and as new as those of its sources that are."""
    if not path.exists():
        return False
    made = path.stat().st_mtime_ns
    return all(source.stat().st_mtime_ns <= made for source in sources if source.exists())


def _shapes(config, module, splits):
    """The shapes of the network's variables; refuses images that it does not take."""
    if not len(splits.validation.labels) and config.evaluate.checkpoint == 'best':
        raise ValueError('config.evaluate.checkpoint=best needs config.dataset.validation above 0')
    return jax.eval_shape(lambda: _initial_variables(config, module, splits))


def _initial_variables(config, module: linen.Module, splits: Splits) -> dict:
    images = jnp.zeros((1, *splits.train.images.shape[1:]))
    return module.init(phase_key(config.seed, 'pretrain', 'init'), images)


def _check_claim(config, workdir):
    """Refuses a workdir of another experiment."""
    path = workdir / 'config.json'
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
        if not saved:
            raise ValueError(f'it holds {saved}')
        of_older_version = 'lwm' in saved
        # A version that adds a field gives it the default under which older runs were made.
        saved = configs.completed(saved, configs.identity(configs.default()))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f'{path} is damaged ({error}): move it away, and the command that made {workdir} '
            'writes it anew'
        ) from None
    if of_older_version:
        raise ValueError(
            f'{workdir} holds a run of robustprune_jax 0.1, of which only the report can be made '
            'anew: choose a new --workdir'
        )
    here = configs.identity(config)
    for fields in (saved, here):  # those of a method that is new here differ from nothing
        fields['overrides'] = {
            method: values
            for method, values in configs.overrides(fields['overrides']).items()
            if any(workdir.glob(f'density_*/{method}'))
        }
    found = '; '.join(differences(saved, here))
    if found:
        raise ValueError(
            f'{workdir} holds another experiment (there, here): {found}; choose a new --workdir'
        )


@contextlib.contextmanager
def _claimed(config, workdir):
    """Holds the workdir, with config.json in it; refuses one that is not the same folder on every
    host, or that another run is in."""
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if jax.process_index() == 0:
                stack.enter_context(locked(workdir))
                write_atomically(workdir / 'config.json', config.to_json(indent=1) + '\n')
        with distributed.together():
            if not (workdir / 'config.json').exists():
                raise FileNotFoundError(
                    f'no config.json in {workdir}: --workdir must be a folder that all hosts share'
                )
        yield


def _before(part: Part) -> Part:
    """The part that ends with the network that `part` starts from."""
    first = _first(part)
    return Part('pretrain') if part == first else first


def _first(part: Part) -> Part:
    """The first part of its method and density, which starts from the dense network."""
    return part._replace(phase=_phases(part.method)[0])


def _source(config, wanted, part: Part, workdir: Path) -> Path:
    """Where the network is that a part starts from: config.source, or in the workdir."""
    before = _before(part)
    if config.source and before.phase not in wanted:
        return Path(config.source)
    return workdir / before.folder


def _teacher(config, wanted, part: Part, workdir: Path) -> Path | None:
    """Where the pretrained network is that a part learns from, if it does; config: for_method's."""
    if part.phase != 'finetune' or not config.finetune.distillation:
        return None
    return _source(config, wanted, _first(part), workdir)


def _check_sources(config, wanted, parts, splits, workdir):
    """Every part's source is there, or will be made by an earlier part, and fits."""
    if config.source and 'pretrain' in wanted:
        raise ValueError(
            'config.source is given, and pretrain is among config.phases: it starts from scratch'
        )
    if config.source and wanted == ['evaluate']:
        _check_source(config, splits, Path(config.source), None)
    for part in parts:
        if part.phase != 'pretrain' and _before(part).phase not in wanted:
            _check_source(config, splits, _source(config, wanted, part, workdir), part)
        teacher = _teacher(configs.for_method(config, part.method), wanted, part, workdir)
        if teacher and 'pretrain' not in wanted:
            try:
                _check_source(config, splits, teacher, _first(part))
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(
                    f'finetune.distillation wants the dense network: {error}'
                ) from None


def _check_source(config, splits, path, part):
    try:
        meta = checkpoint.load_meta(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}; or add the phase to config.phases') from None
    if meta['step'] < meta['total_steps']:
        raise ValueError(
            f'the phase in {path} is unfinished, at step {meta["step"]} of {meta["total_steps"]}: '
            'finish it first, the command that made it goes on'
        )
    expected = {
        'arch': config.arch,
        'num_classes': config.dataset.num_classes,
        'image_shape': list(splits.train.images.shape[1:]),
    }
    if part:
        before = _before(part)
        expected['phase'] = before.phase
        if before.phase == 'prune':
            expected['density'] = part.density
            expected |= {'method': part.method} if meta['method'] else {}  # imported: not said
    found = {field: meta.get(field) for field in expected}
    wrong = '; '.join(differences(found, expected))
    if wrong:
        raise ValueError(
            f'the checkpoint {path} does not fit {part or "evaluate"} (found, expected): {wrong}'
        )


def _networks(config, wanted, workdir) -> dict[str, Path]:
    """The finished networks by name, in the order of the table."""
    if config.source and wanted == ['evaluate']:
        meta = checkpoint.load_meta(config.source)
        part = Part(meta['phase'], meta['method'] or 'imported', meta['density'])
        return {(part if part.density else Part('pretrain')).network: Path(config.source)}
    trained = 'pretrain', 'finetune', *(['prune'] if config.evaluate.pruned else [])
    folders = {part.network: workdir / part.folder for part in _parts(config, trained)}
    return {name: path for name, path in folders.items() if checkpoint.is_finished(path)}


def _title(meta: dict) -> str:
    """What reports call a network."""
    if meta['density'] is None:
        return 'pretrained'
    method = meta['method'] or 'imported'
    return METHODS[method].title if method in METHODS else method


def _read_result(config, workdir) -> dict:
    """result.json so far, or a new one."""
    path, old = workdir / 'result.json', {'seconds': 0.0, 'versions': {}, 'networks': []}
    try:
        if path.exists():
            old = {**old, **json.loads(path.read_text())}
        networks = {network['name']: network for network in old['networks']}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path} is damaged ({error}): move it away, and the same command writes it anew, '
            f'from what {workdir / "examples"} holds'
        ) from None
    return {
        'arch': config.arch,
        'dataset': config.dataset.name,
        'objective': config.objective,
        'seed': config.seed,
        'seconds': old['seconds'],
        'versions': old['versions'],
        'networks': list(networks.values()),
    }
