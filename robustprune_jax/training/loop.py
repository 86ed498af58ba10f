"""Training: pretrain, prune and finetune are one loop with different arguments."""

import math
import signal
import sys
import threading
import zlib
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from flax import linen
from jax.sharding import Mesh
from ml_collections import ConfigDict

from robustprune_jax.config import Part, objective_name, pseudo_per_batch, repeats
from robustprune_jax.data import Splits
from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.data.batches import train_batches
from robustprune_jax.network import logits_fn, with_masks
from robustprune_jax.objectives import OBJECTIVES, Objective
from robustprune_jax.objectives.distillation import distilled
from robustprune_jax.objectives.penalties import penalised
from robustprune_jax.pruning import Choice, Method, configured
from robustprune_jax.pruning.perturb import Perturbation
from robustprune_jax.runtime import distributed, sharding
from robustprune_jax.runtime.registry import lookup
from robustprune_jax.training.average import Average
from robustprune_jax.training.checkpoint import Checkpoints
from robustprune_jax.training.log import PhaseLog
from robustprune_jax.training.optim import optimizer, phase_labels, schedule, warmup_steps
from robustprune_jax.training.profile import Profile
from robustprune_jax.training.start import checkpoint_meta, choice, phase_key, stream
from robustprune_jax.training.state import place
from robustprune_jax.training.step import Step, create_state, train_step
from robustprune_jax.training.validation import validate


class Phase(NamedTuple):
    """What is to be trained, and how long. One epoch is a pass over the data.

    method: None in pretrain. choice: of the masks, where they are chosen anew in every step, in
    prune. moves: of those that move, in finetune. section: the phase's settings, with epochs as
    passes; pseudo: how many images of a batch are pseudo-labelled.
    """

    part: Part
    method: Method | None
    choice: Choice | None
    moves: Choice | None
    objective: Objective
    section: ConfigDict
    pseudo: int
    steps_per_epoch: int
    total_steps: int

    @property
    def stream(self) -> str:
        return stream(self.part, self.method)

    @property
    def updates_per_epoch(self) -> int:
        return self.steps_per_epoch * self.objective.repeats


class Due(NamedTuple):
    """What follows a step."""

    logs: bool
    validates: bool
    saves: bool


def train(
    config: ConfigDict,
    part: Part,
    module: linen.Module,
    variables: dict,
    splits: Splits,
    directory: Path,
    teacher: dict | None = None,
) -> None:
    """Trains `variables` through one phase, into directory/{checkpoints, metrics.jsonl}.

    config: with the settings of the part's method in it (config.for_method). teacher: the dense
    network, for finetune.distillation. Goes on from the latest checkpoint in `directory`, bit for
    bit as if never interrupted. On SIGTERM to one process all save, at the same step, and leave
    with exit status 0; Ctrl-C does it too, where there is one process. Raises FloatingPointError
    when the loss is not finite: the last good checkpoint is kept.
    """
    phase, mesh = _phase(config, part, module, variables, splits), sharding.make_mesh()
    # Imported tensors without a counterpart: carried along for the converter, not to the devices.
    unused = {name: value for name, value in variables.items() if name == 'unused'}
    variables = {name: value for name, value in variables.items() if name != 'unused'}
    image_shape = splits.train.images.shape[1:]
    state, update = _prepare(config, phase, module, variables, teacher, image_shape, mesh)
    key = phase_key(config.seed, phase.stream, 'step')
    learning_rate = schedule(phase.section, phase.updates_per_epoch)
    about = {
        **checkpoint_meta(config, part, phase.method, splits),
        'total_steps': phase.total_steps,
    }
    validated = partial(_validated, config, phase, module, splits, mesh)
    data = _batches(config, phase, splits)

    with (
        closing(data),
        Checkpoints(directory / 'checkpoints') as checkpoints,
        _StopRequest() as stop,
        Profile(config.profile, directory / 'profile') as profile,
    ):
        state = checkpoints.restore(state, data)
        start = saved = int(state.step)
        pending = []
        with PhaseLog(directory, str(part), start, phase.total_steps, phase.steps_per_epoch) as log:
            for step in range(start + 1, phase.total_steps + 1):
                profile.before(step)
                state, metrics = update(state, sharding.shard_batch(mesh, next(data)), key)
                profile.after(step, metrics)
                pending.append(metrics)
                log.step(phase.section.batch_size)

                due, quality = _due(config, phase, step), None
                stops = stop.requested or distributed.preempted()
                if due.logs or stops:
                    values = _averages(phase, pending, state.first_nan, saved, directory)
                    pending.clear()
                    last_update = step * phase.objective.repeats - 1
                    values['learning_rate'] = float(learning_rate(last_update))
                    values['images_per_second'] = round(log.images_per_second(), 1)
                if due.validates and len(splits.validation.labels):
                    found, quality = validated(state.variables, step, log)
                    values |= found
                if due.logs or stops:
                    log.write(step, **values)
                if due.saves or stops:
                    networks = _networks(phase, state, unused)
                    at = {**about, 'step': step, 'epoch': step // phase.steps_per_epoch}
                    checkpoints.save(state, networks, data, at, quality)
                    saved = step
                if stops:
                    checkpoints.wait()
                    log.tell(f'stopped at step {step}, saved; the same command goes on.')
                    sys.exit(0)


def _networks(phase: Phase, state, unused: dict) -> dict[str, dict]:
    """What is saved of a state: the network and, where there is one, its average, with masks."""
    found = {'variables': state.variables}
    if state.average:
        found['average'] = {**state.variables, **state.average}
    return {item: {**with_masks(of, phase.choice), **unused} for item, of in found.items()}


def _validated(config, phase: Phase, module, splits, mesh, variables, step, log):
    """Returns validation's accuracies, and the one that chooses the best checkpoint."""
    network = logits_fn(module, with_masks(variables, phase.choice))
    key = phase_key(config.seed, phase.stream, 'validation')
    found = validate(config, phase.objective, network, key, splits, mesh)
    log.images_per_second()  # validation's time is not training's
    if phase.part.phase == 'pretrain' and step == phase.total_steps:
        _tell_of_guesses(log, found, config.dataset.num_classes)
    return found, list(found.values())[-1]


def _averages(phase: Phase, pending, first_nan, saved: int, directory: Path) -> dict[str, float]:
    """The metrics' means over some steps: the only wait for the device between validations."""
    gathered, first_nan = jax.device_get((pending, first_nan))
    if first_nan >= 0:
        kept = (
            f'the checkpoint of step {saved} is kept in {directory}' if saved else 'none is saved'
        )
        raise FloatingPointError(
            f'{phase.part}: the loss is not finite at step {first_nan + 1}; {kept}. A lower '
            'learning rate may help.'
        )
    return {name: float(np.mean([metrics[name] for metrics in gathered])) for name in gathered[0]}


def _phase(config, part: Part, module, variables, splits) -> Phase:
    method = part.method and configured(part.method, config.pruning)
    prunes = part.phase == 'prune'
    moves = part.phase == 'finetune' and method.dynamic is not None
    image_shape, chosen = splits.train.images.shape[1:], None
    if prunes or moves:
        chosen = choice(config, part, module, variables['scores'], image_shape)
    objective = lookup(OBJECTIVES, objective_name(config, part.phase), 'objective')(config)
    section, pseudo, steps_per_epoch = _passes(config, part.phase, splits)
    objective = penalised(objective, section, config.certified)
    if part.phase == 'finetune':
        objective = distilled(objective, section.distillation)
    total_steps = section.epochs * steps_per_epoch
    return Phase(
        part,
        method,
        chosen if prunes else None,
        chosen if moves else None,
        objective,
        section,
        pseudo,
        steps_per_epoch,
        total_steps,
    )


def _passes(config, phase: str, splits) -> tuple[ConfigDict, int, int]:
    """A phase's section, its epochs as passes over the data; how many images of a batch are
    pseudo-labelled; and the steps of a pass."""
    section, updates = config[phase].copy_and_resolve_references(), repeats(config, phase)
    section.epochs = math.ceil(section.epochs / updates)
    section.warmup_epochs /= updates
    section.ramp_epochs /= updates
    section.perturbation.warmup_epochs /= updates
    section.milestones = tuple(epoch / updates for epoch in section.milestones)
    pseudo = pseudo_per_batch(config, section.batch_size)
    return section, pseudo, math.ceil(len(splits.train.labels) / (section.batch_size - pseudo))


def check_warmup(config: ConfigDict, part: Part, splits: Splits) -> None:
    """Raises ValueError where a part trains, and its warm-up leaves no step at the full rate."""
    section, _, steps_per_epoch = _passes(config, part.phase, splits)
    updates = steps_per_epoch * repeats(config, part.phase)
    total, warmup = section.epochs * updates, warmup_steps(section, updates)
    if total and warmup >= total:
        raise ValueError(
            f'config.{part.phase}.warmup_epochs is {config[part.phase].warmup_epochs:g}: it takes '
            f'all {total} steps of {part}; expected at least one step less'
        )


def _prepare(config, phase: Phase, module, variables, teacher, image_shape, mesh: Mesh):
    """The first state, on the devices, and the compiled step."""
    labels = phase_labels(variables, phase.part.phase, config.prune.freeze_bn)
    tx = optimizer(phase.section, labels, phase.updates_per_epoch, config.pruning.rates)
    perturbation = phase.section.perturbation
    batch_shape = (phase.section.batch_size, *image_shape)
    average = Average(**config.average) if config.average.decay else None
    state = create_state(variables, tx, phase.objective, batch_shape, average is not None, teacher)
    spec = Step(
        module,
        phase.objective,
        tx,
        lookup(AUGMENTATIONS, config.dataset.augment, 'augmentation'),
        mesh,
        steps_per_epoch=phase.steps_per_epoch,
        total_steps=phase.total_steps,
        ramp_epochs=phase.section.ramp_epochs,
        choice=phase.choice,
        moves=phase.moves,
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
        compute_dtype=config.compute_dtype,
        matmul_precision=config.matmul_precision,
        perturbation=Perturbation(**perturbation) if perturbation.gamma else None,
        average=average,
    )
    return place(state, mesh), train_step(spec)


def _batches(config, phase: Phase, splits) -> grain.DatasetIterator:
    return train_batches(
        *splits.train,
        batch_size=phase.section.batch_size,
        seed=zlib.crc32(f'{config.seed}/{phase.stream}'.encode()),
        process=(jax.process_index(), jax.process_count()),
        workers=config.workers,
        pseudo=splits.pseudo,
        pseudo_count=phase.pseudo,
    )


def _due(config, phase: Phase, step: int) -> Due:
    epoch, within_epoch = divmod(step, phase.steps_per_epoch)
    ends_epoch, last = within_epoch == 0, step == phase.total_steps
    return Due(
        logs=ends_epoch or step % config.log_every == 0,
        validates=ends_epoch and (last or epoch % config.validate_every == 0),
        saves=ends_epoch and (last or epoch % config.checkpoint_every == 0),
    )


def _tell_of_guesses(log, validation, num_classes):
    if validation['validation_accuracy'] < 1.2 / num_classes:
        log.tell(
            'the network does no better than guessing: a lower config.pretrain.learning_rate or '
            'more epochs may help.'
        )


class _StopRequest:
    """While entered, SIGTERM or Ctrl-C to the only process just sets `requested`: the loop saves
    and leaves by itself. A second one does what it did before."""

    SIGNALS = signal.SIGTERM, signal.SIGINT

    def __init__(self):
        self.requested = False

    def __enter__(self):
        # Python sets signal handlers in the main thread only. Several processes have jax's, which
        # tells all of them: distributed.preempted.
        main_thread = threading.current_thread() is threading.main_thread()
        self._handles = main_thread and jax.process_count() == 1
        if self._handles:
            self._before = [signal.signal(number, self._request) for number in self.SIGNALS]
        return self

    def _request(self, number, frame):
        self.requested = True
        self._restore()

    def __exit__(self, *exception):
        if self._handles:
            self._restore()

    def _restore(self):
        for number, before in zip(self.SIGNALS, self._before, strict=True):
            signal.signal(number, before)
