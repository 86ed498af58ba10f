"""Training: pretrain, prune, finetune and lwm are one loop with different arguments."""

import math
import signal
import sys
import threading
import zlib
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from ml_collections import ConfigDict

from robustprune_jax import distributed, sharding
from robustprune_jax.attacks import cross_entropy
from robustprune_jax.bounds import margins, verified
from robustprune_jax.checkpoint import Checkpoints
from robustprune_jax.config import lookup, objective_name, pseudo_per_batch
from robustprune_jax.data import Split, Splits
from robustprune_jax.data.augment import AUGMENTATIONS, to_float
from robustprune_jax.data.batches import eval_batches, train_batches
from robustprune_jax.log import PhaseLog
from robustprune_jax.masks import apply_masks, init_scores, snip_scores
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.optim import optimizer, phase_labels, schedule
from robustprune_jax.smoothing import soft_radii
from robustprune_jax.step import (
    create_state,
    logits_fn,
    place,
    predictions,
    train_step,
    with_masks,
)


def phase_key(seed: int, phase: str, use: str) -> jax.Array:
    """Returns the key of one use in one phase: no two of them share random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f'{phase}/{use}'.encode()))


def start_variables(
    config: ConfigDict,
    phase: str,
    density: float | None,
    source: dict,
    module: linen.Module,
    splits: Splits,
) -> dict:
    """Returns the variables that `phase` starts from, given those of its source.

    prune and lwm take a pretrained network and give it scores (config.prune.score_init,
    config.lwm.score_init), lwm also the masks that they choose, and its weights 1 / sqrt(density)
    times as large where config.lwm.rescale says so; finetune takes a pruned network, with its
    scores and masks.
    """
    if phase == 'finetune':
        return source
    names = ('params', 'batch_stats', 'unused')
    variables = {name: source[name] for name in names if name in source}
    how, key = config[phase].score_init, phase_key(config.seed, phase, 'scores')
    if how == 'snip':
        variables['scores'] = _snip(config[phase].batch_size, key, variables, module, splits.train)
    else:
        variables['scores'] = init_scores(variables['params'], how, key)
    if phase == 'prune':
        return variables
    if config.lwm.rescale:
        grown = jax.tree.map(lambda _: np.float32(density**-0.5), variables['scores'])
        variables['params'] = apply_masks(variables['params'], grown)
    return with_masks(variables, density)


def _snip(batch_size, key, variables, module, train):
    """SNIP's scores, on one batch of training images."""
    rows = np.asarray(jax.random.permutation(key, len(train.labels))[:batch_size])
    batch = next(eval_batches(train.images[rows], train.labels[rows], len(rows)))

    @jax.jit
    def scores(params, images, labels):
        def loss(params):
            logits = module.apply({**variables, 'params': params}, images, train=False)
            return jnp.mean(cross_entropy(logits, labels))

        return snip_scores(loss, params)

    return scores(variables['params'], to_float(batch['image']), batch['label'])


def meta(config: ConfigDict, phase: str, density: float | None, splits: Splits) -> dict:
    """Returns what a checkpoint says of its network, but for the steps."""
    return {
        'arch': config.arch,
        'num_classes': config.dataset.num_classes,
        'image_shape': list(splits.train.images.shape[1:]),
        'phase': phase,
        'density': density,
        'objective': objective_name(config, phase),
        'score_init': config[phase].get('score_init'),
        'seed': config.seed,
    }


def train(
    config: ConfigDict,
    phase: str,
    density: float | None,
    module: linen.Module,
    variables: dict,
    splits: Splits,
    directory: Path,
) -> None:
    """Trains `variables` through one phase, into directory/{checkpoints, metrics.jsonl}.

    phase: pretrain, prune, finetune or lwm; density: its kept fraction, None in pretrain. Goes on
    from the latest checkpoint in `directory`, bit for bit as if never interrupted. On SIGTERM to
    one process all save, at the same step, and leave with exit status 0; Ctrl-C does it too, where
    there is one process. Raises FloatingPointError when the loss is not finite: the last good
    checkpoint is kept.
    """
    name = phase if density is None else f'{phase} {density}'
    objective = lookup(OBJECTIVES, objective_name(config, phase), 'objective')(config)
    section = _in_passes(config[phase], objective.repeats)
    mixed = pseudo_per_batch(config, section.batch_size)
    steps_per_epoch = math.ceil(len(splits.train.labels) / (section.batch_size - mixed))
    total_steps = section.epochs * steps_per_epoch
    mask_density = density if phase == 'prune' else None

    # Imported tensors without a counterpart: carried along for the converter, not to the devices.
    unused = {name: value for name, value in variables.items() if name == 'unused'}
    variables = {name: value for name, value in variables.items() if name != 'unused'}
    mesh = sharding.make_mesh()
    labels = phase_labels(variables, phase, config.prune.freeze_bn)
    updates_per_epoch = steps_per_epoch * objective.repeats
    tx = optimizer(section, labels, updates_per_epoch)
    learning_rate = schedule(section, updates_per_epoch)
    image_shape = splits.train.images.shape[1:]
    state = create_state(variables, tx, objective, (section.batch_size, *image_shape))
    state = place(state, mesh)
    update = train_step(
        module,
        objective,
        tx,
        lookup(AUGMENTATIONS, config.dataset.augment, 'augmentation'),
        mesh,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        ramp_epochs=section.ramp_epochs,
        density=mask_density,
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
        compute_dtype=config.compute_dtype,
    )
    data = train_batches(
        *splits.train,
        batch_size=section.batch_size,
        seed=zlib.crc32(f'{config.seed}/{phase}'.encode()),
        process=(jax.process_index(), jax.process_count()),
        workers=config.workers,
        pseudo=splits.pseudo,
        pseudo_count=mixed,
    )
    key = phase_key(config.seed, phase, 'step')
    about = {**meta(config, phase, density, splits), 'total_steps': total_steps}

    with closing(data), Checkpoints(directory / 'checkpoints') as checkpoints:
        state = checkpoints.restore(state, data)
        start = saved = int(state.step)
        pending = []

        def gathered_metrics(step):
            """Averages since the last call: the only wait for the device between validations."""
            gathered, first_nan = jax.device_get((pending, state.first_nan))
            pending.clear()
            if first_nan >= 0:
                raise FloatingPointError(
                    f'{name}: the loss is not finite at step {first_nan + 1}; the checkpoint of '
                    f'step {saved} is kept in {directory}. A lower learning rate may help.'
                )
            means = {k: float(np.mean([m[k] for m in gathered])) for k in gathered[0]}
            rates = {
                'learning_rate': float(learning_rate(step * objective.repeats - 1)),
                'images_per_second': round(log.images_per_second(), 1),
            }
            return {**means, **rates}

        def validate():
            network = logits_fn(module, with_masks(state.variables, mask_density))
            validation_key = phase_key(config.seed, phase, 'validation')

            def is_right(attack, batch):
                images, labels = batch['image'], batch['label']
                return predictions(network, validation_key, images, labels, attack) == labels

            def is_verified(batch):
                lower = margins(
                    network, to_float(batch['image']), batch['label'], **objective.certificate
                )
                return verified(lower)

            def radii(batch):
                images, labels = to_float(batch['image']), batch['label']
                return soft_radii(network, validation_key, images, labels, **objective.smoothing)

            measures = {'validation_accuracy': partial(is_right, None)}
            if objective.attack:
                measures['validation_robust_accuracy'] = partial(is_right, objective.attack)
            if objective.certificate:
                measures['validation_verified_accuracy'] = is_verified
            if objective.smoothing:
                measures['validation_radius'] = radii
            return {
                metric: _mean(measure, mesh, splits.validation, config.evaluate.batch_size)
                for metric, measure in measures.items()
            }

        with (
            _StopRequest() as stop,
            PhaseLog(directory, name, start, total_steps, steps_per_epoch) as log,
        ):
            for step in range(start + 1, total_steps + 1):
                batch = sharding.shard_batch(mesh, next(data))
                state, metrics = update(state, batch, key)
                pending.append(metrics)
                log.step(section.batch_size)

                epoch, within_epoch = divmod(step, steps_per_epoch)
                ends_epoch, last = within_epoch == 0, step == total_steps
                stops = stop.requested or distributed.preempted()
                validates = ends_epoch and (last or epoch % config.validate_every == 0)
                saves = validates or (ends_epoch and epoch % config.checkpoint_every == 0)
                if ends_epoch or stops or step % config.log_every == 0:
                    values = gathered_metrics(step)
                    quality = None
                    if validates and len(splits.validation.labels):
                        validation = validate()
                        quality = list(validation.values())[-1]  # the harder one
                        guesses = (
                            validation['validation_accuracy'] < 1.2 / config.dataset.num_classes
                        )
                        if phase == 'pretrain' and last and guesses:
                            log.tell(
                                'the network does no better than guessing: a lower '
                                'config.pretrain.learning_rate or more epochs may help.'
                            )
                        values |= validation
                        log.images_per_second()  # validation's time is not training's
                    log.write(step, **values)
                if saves or stops:
                    checkpoints.save(
                        state,
                        {**with_masks(state.variables, mask_density), **unused},
                        data,
                        {**about, 'step': step, 'epoch': epoch},
                        quality,
                    )
                    saved = step
                if stops:
                    checkpoints.wait()
                    log.tell(f'stopped at step {step}, saved; the same command goes on.')
                    sys.exit(0)


def _in_passes(section, repeats):
    """A phase's settings with its epochs as passes over the data, `repeats` updates on a batch."""
    section = section.copy_and_resolve_references()
    section.epochs = math.ceil(section.epochs / repeats)
    section.warmup_epochs /= repeats
    section.ramp_epochs /= repeats
    return section


def _mean(measure, mesh, split: Split, batch_size):
    total = 0.0
    for batch in eval_batches(*split, batch_size):
        values = distributed.gather(measure(sharding.put(batch, sharding.sharded(mesh))))
        total += np.sum(values[batch['mask']])
    return float(total / len(split.labels))


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
