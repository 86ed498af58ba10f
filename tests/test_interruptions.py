"""The same command again: after a kill, a stop, damage, divergence, or for nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import assert_same, weights

from robustprune_jax import pipeline
from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.training import checkpoint

ROOT = Path(__file__).parents[1]


def test_the_same_command_redoes_nothing(finished, tiny_config, tmp_path):
    """The cards, too, say what they said: by which commit the networks were measured."""
    workdir, result = finished
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    for card in (copy / 'export').glob('*.json'):
        dated(card)

    def files():
        return {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}

    before, config = files(), tiny_config()
    config.report = True
    assert pipeline.run(config, copy) == result
    assert files() == before


def dated(card):
    """Makes a card one of an earlier commit."""
    card.write_text(json.dumps(json.loads(card.read_text()) | {'commit': 'earlier'}))


def launch(config, workdir):
    """The command line, with every field given as a flag of the embedded config."""
    flags = []

    def add(section, prefix):
        for name, value in section.items():
            if hasattr(value, 'items'):
                add(value, f'{prefix}{name}.')
            else:
                flags.append(f'--config.{prefix}{name}={value}')

    add(config, '')
    return subprocess.Popen(
        [sys.executable, 'main.py', '--config=configs/digits.py', f'--workdir={workdir}', *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process, timeout=300):
    """Waits until a phase has logged its first epoch."""
    end = time.monotonic() + timeout
    while not read_jsonl(path / 'metrics.jsonl'):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f'{path} did not begin'
        time.sleep(0.02)


def test_killed_and_stopped_runs_end_with_the_same_weights(finished, tiny_config, tmp_path):
    config = tiny_config()
    config.densities, config.phases = (0.5,), 'pretrain,prune,finetune'
    workdir = tmp_path / 'killed'
    twice, once = (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)
    for part, signals in (('pretrain', twice), ('density_0.5/hydra/prune', once)):
        process = launch(config, workdir)
        wait_for(workdir / part, process)
        for number in signals:
            process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        # The second one ends the run at once, if it comes while the first is worked on.
        assert process.returncode == 0 or signals is twice, output
        assert 'Traceback' not in output
        assert not checkpoint.is_finished(workdir / part)
        assert 'the same command goes on' in output
        assert not (workdir / 'lock').exists()

    process = launch(config, workdir)
    wait_for(workdir / 'density_0.5/hydra/finetune', process)
    with pytest.raises(ValueError, match=f'in use by process {process.pid}'):
        pipeline.run(config, workdir)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not checkpoint.is_finished(workdir / 'density_0.5/hydra/finetune')

    process = launch(config, workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for part in (
        'pretrain',
        'density_0.5/hydra/prune',
        'density_0.5/hydra/finetune',
        'density_0.5/lwm/finetune',
    ):
        assert_same(weights(workdir / part), weights(finished[0] / part))
        steps = [line['step'] for line in read_jsonl(workdir / part / 'metrics.jsonl')]
        assert steps == sorted(set(steps))  # the killed run's lines do not stay beside the new


def test_an_interrupted_evaluation_goes_on(finished, tiny_config, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    path = copy / 'examples/hydra_0.5.pgd.jsonl'
    cards = [copy / f'export/{name}.json' for name in ('lwm_0.5', 'hydra_0.5')]
    for card in cards:
        dated(card)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text(''.join(lines[:25]) + lines[25][:7])  # killed in the middle of a line
    pipeline.run(tiny_config(), copy)
    assert path.read_text() == whole
    kept, measured = (json.loads(card.read_text())['commit'] for card in cards)
    assert kept == 'earlier' != measured

    # Damaged lines, in another order: what they held is computed again, and joined by its index.
    path.write_text(''.join([lines[0], *lines[:0:-1], '[]\n']).replace(lines[3], '{"ind\n'))
    pipeline.run(tiny_config(), copy)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    shutil.copy(finished[0] / 'examples/hydra_0.5.pgd.jsonl', path)

    config = tiny_config()
    config.evaluate.pgd.steps = 4
    with pytest.raises(ValueError, match='steps: 3, 4'):
        pipeline.run(config, copy)
    assert path.read_text() == whole


def test_divergence_stops_and_keeps_what_is_saved(finished, tiny_config, tmp_path):
    config = tiny_config()
    config.source = str(finished[0] / 'pretrain')
    config.phases, config.methods = 'finetune', 'lwm'
    config.densities = (0.5,)
    config.finetune.update(learning_rate=1e25, warmup_epochs=1.0)
    config.log_every = 1
    with pytest.raises(
        FloatingPointError, match=r'lwm 0.5 finetune: the loss is not finite'
    ) as error:
        pipeline.run(config, tmp_path)
    logged = read_jsonl(
        tmp_path / 'density_0.5/lwm/finetune/metrics.jsonl'
    )  # steps as the log counts them
    assert f'at step {len(logged) + 1};' in str(error.value)
    saved = (
        weights(tmp_path / 'density_0.5/lwm/finetune')
        if list(tmp_path.glob('*/lwm/finetune/*/*'))
        else {}
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_checkpoint_every_decides_what_is_saved(tiny_config, tmp_path):
    config = tiny_config()
    config.arch, config.objective, config.phases = 'lin_1', 'natural', 'pretrain'
    config.checkpoint_every = 2
    # A linear network's weights grow 100 times a step: their norm overflows in the tenth of twelve.
    config.pretrain.update(
        epochs=4, learning_rate=1.0, momentum=0.0, weight_decay=100.0, schedule='constant'
    )
    with pytest.raises(FloatingPointError, match='the checkpoint of step 6 is kept'):
        pipeline.run(config, tmp_path)
    assert checkpoint.load_meta(tmp_path / 'pretrain')['step'] == 6


def test_a_damaged_checkpoint_is_made_again_from_the_one_before(
    finished, tiny_config, tmp_path, capsys
):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    newest = copy / 'density_0.5/lwm/finetune/checkpoints/12'
    file = max((newest / 'variables').rglob('*'), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    config = tiny_config()
    config.phases, config.methods = 'finetune', 'lwm'
    pipeline.run(config, copy)
    out = capsys.readouterr().out
    assert (
        f'{file} is damaged' in out
        and 'lwm 0.5 finetune  step 12/12' in out
        and 'step 9/' not in out
    )
    assert_same(
        weights(copy / 'density_0.5/lwm/finetune'),
        weights(finished[0] / 'density_0.5/lwm/finetune'),
    )
