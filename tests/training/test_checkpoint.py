"""Checkpoints that are damaged, or that the disk has no room for."""

import os
import resource

import numpy as np
import pytest

from robustprune_jax.training import checkpoint

META = {'arch': 'mnist_model', 'phase': 'pretrain', 'method': None, 'density': None}


def a_network(value):
    return {'params': {'dense': {'kernel': np.full((40, 40), value, np.float32)}}}


def save(checkpoints, step, quality=None):
    items = {'variables': a_network(step), 'meta': {**META, 'step': step}}
    checkpoints.save_items(step, items, quality and {'quality': quality})


@pytest.fixture
def saved(tmp_path):
    """A phase with two checkpoints, of steps 1 and 2."""
    with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
    return tmp_path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    'damage',
    [flip, lambda path: os.truncate(path, 10), lambda path: os.truncate(path, 0), os.unlink],
)
@pytest.mark.parametrize('item', ['variables', 'meta'])
def test_a_damaged_file_is_named_and_the_checkpoint_before_counts(saved, item, damage):
    files = [path for path in (saved / 'checkpoints/2' / item).rglob('*') if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    damage(file)
    with pytest.raises(ValueError, match=f'{file} is damaged: move .*checkpoints/2 away') as error:
        checkpoint.load(saved)
    assert '\n' not in str(error.value)

    (sentence,) = checkpoint.set_damaged_aside(saved)
    assert str(file) in sentence
    variables, meta = checkpoint.load(saved)
    assert meta['step'] == 1
    np.testing.assert_array_equal(variables['params']['dense']['kernel'], 1)
    assert (saved / 'checkpoints/2.damaged').is_dir()


def test_an_undamaged_checkpoint_stays(saved):
    assert checkpoint.set_damaged_aside(saved) == []
    assert checkpoint.load_meta(saved)['step'] == 2


def test_a_disk_without_room_ends_in_one_line_and_keeps_what_is_saved(saved):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with (
            pytest.raises(OSError, match='cannot save a checkpoint in') as error,
            checkpoint.Checkpoints(saved / 'checkpoints') as checkpoints,
        ):
            save(checkpoints, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert '\n' not in str(error.value)
    assert checkpoint.load(saved)[1]['step'] == 2
    with checkpoint.Checkpoints(saved / 'checkpoints') as checkpoints:
        save(checkpoints, 3)
    assert checkpoint.load(saved)[1]['step'] == 3


def test_long_trainings_keep_the_newest_two_and_the_best_and_no_open_files(tmp_path):
    with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        counts = []
        for step in range(6):
            save(checkpoints, step, quality=0.9 if step == 1 else None)
            checkpoints.wait()
            counts.append(len(os.listdir('/dev/fd')))
    assert counts[-1] <= counts[1]
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '4', '5']
    assert checkpoint.load(tmp_path, 'best')[1]['step'] == 1
