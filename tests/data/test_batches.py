"""Batches: every example once an epoch, exact resume, processes, pseudo-labelled images."""

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from robustprune_jax import pipeline
from robustprune_jax.data import batches
from robustprune_jax.runtime.files import read_jsonl


def images_like(labels, height=3, width=2):
    """Images whose pixels all equal the example's index."""
    column = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(column, (len(labels), height, width, 1)).copy()


def indices(iterator, steps):
    return [next(iterator)['image'][:, 0, 0, 0].tolist() for _ in range(steps)]


def iterate(count=10, batch_size=4, seed=0, **kw):
    labels = np.arange(count)
    return batches.train_batches(
        images_like(labels), labels, batch_size=batch_size, seed=seed, **kw
    )


def test_every_epoch_has_every_example_once_in_a_new_order():
    flat = np.ravel(indices(iterate(), 10))  # four epochs of ten examples
    epochs = flat.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batches_have_their_labels_and_one_shape():
    iterator = iterate()
    for _ in range(6):
        batch = next(iterator)
        assert batch['image'].shape == (4, 3, 2, 1) and batch['image'].dtype == np.uint8
        assert batch['label'].dtype == np.int32
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


def test_order_depends_on_the_seed_alone():
    assert indices(iterate(seed=3), 5) == indices(iterate(seed=3), 5)
    assert indices(iterate(seed=3), 5) != indices(iterate(seed=4), 5)


def test_a_data_set_smaller_than_the_batch():
    assert sorted(indices(iterate(count=2), 1)[0]) == [0, 0, 1, 1]


def test_processes_share_the_global_batch():
    whole = indices(iterate(), 5)
    parts = [indices(iterate(process=(i, 2)), 5) for i in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match='batch_size=4 does not divide among 3 processes'):
        iterate(process=(0, 3))


def test_resume_from_state():
    iterator = iterate()
    indices(iterator, 3)
    state = iterator.get_state()
    expected = indices(iterator, 6)
    other = iterate()
    other.set_state(state)
    assert indices(other, 6) == expected


def test_resume_through_orbax(tmp_path):
    iterator = iterate()
    assert isinstance(iterator, grain.DatasetIterator)
    indices(iterator, 3)
    with ocp.training.Checkpointer(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.save_checkpointables(3, {'data': iterator})
    expected = indices(iterator, 6)
    other = iterate()
    with ocp.training.Checkpointer(tmp_path / 'checkpoints') as checkpoints:
        checkpoints.load_checkpointables(3, {'data': other})
    assert indices(other, 6) == expected


def mixed(steps, **kw):
    """Labels 0..9, and pseudo-labelled images of labels 100..106: three of a batch of eight."""
    labels = np.arange(7) + 100
    pseudo = images_like(labels) + 100, labels
    iterator = iterate(**{'batch_size': 8, 'pseudo': pseudo, 'pseudo_count': 3, **kw})
    return iterator, [next(iterator) for _ in range(steps)]


def test_pseudo_labelled_images_are_mixed_into_every_batch():
    _, seen = mixed(14)
    for batch in seen:
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
        # Evenly: places (i + 1/2) / 3 among (i + 1/2) / 5.
        assert (batch['label'] >= 100).tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    labels = np.stack([batch['label'] for batch in seen])
    # 14 batches: seven epochs of the ten, six of the seven; neither waits for the other.
    assert np.bincount(labels[labels < 100]).tolist() == [7] * 10
    assert np.bincount(labels[labels >= 100] - 100).tolist() == [6] * 7


def test_mixed_batches_resume_and_are_shared_by_processes():
    iterator, _ = mixed(3)
    state = iterator.get_state()
    expected = [next(iterator)['label'].tolist() for _ in range(4)]
    again, _ = mixed(0)
    again.set_state(state)
    assert [next(again)['label'].tolist() for _ in range(4)] == expected
    parts = [mixed(7, process=(i, 2))[1][3:] for i in range(2)]
    joined = [[*a['label'], *b['label']] for a, b in zip(*parts, strict=True)]
    assert joined == expected


def test_an_epoch_is_once_through_the_labelled_images(tiny_config, tmp_path):
    config = tiny_config()
    path = tmp_path / 'generated.npz'
    np.savez(path, image=np.zeros((5, 12, 12, 1), np.uint8), label=np.arange(5) % 3)
    config.dataset.update(pseudo_labelled=str(path), pseudo_ratio=0.25)
    config.update(objective='natural', phases='pretrain')
    config.pretrain.epochs = 2
    pipeline.run(config, tmp_path / 'run')
    lines = read_jsonl(tmp_path / 'run' / 'pretrain' / 'metrics.jsonl')
    # 96 images (16 of 112 held out), 24 of a batch of 32: four steps, three would be all of it.
    assert [line['step'] for line in lines] == [4, 8]


def test_evaluation_sees_every_example_once_and_marks_the_padding():
    labels = np.arange(10)
    seen = list(batches.eval_batches(images_like(labels), labels, 4))
    assert [batch['mask'].tolist() for batch in seen] == [
        [True] * 4,
        [True] * 4,
        [True] * 2 + [False] * 2,
    ]
    for batch in seen:
        assert batch['image'].shape == (4, 3, 2, 1) and batch['image'].dtype == np.uint8
        assert batch['label'].shape == (4,) and batch['label'].dtype == np.int32
    kept = np.concatenate([batch['label'][batch['mask']] for batch in seen])
    np.testing.assert_array_equal(kept, labels)
    assert seen[-1]['image'][:, 0, 0, 0].tolist() == [8, 9, 0, 0]
