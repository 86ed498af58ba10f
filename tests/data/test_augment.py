"""Augmentation: crops and flips by hand, and on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robustprune_jax.data import augment


def test_to_float():
    scaled = augment.to_float(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(scaled, [0, 0.2, 1], rtol=1e-6)
    assert scaled.max() == 1 and scaled.dtype == jnp.float32


def test_crop_at_by_hand():
    image = jnp.arange(1.0, 5).reshape(1, 2, 2, 1)  # 1 2 / 3 4
    images = jnp.tile(image, (4, 1, 1, 1))
    windows = augment.crop_at(images, jnp.array([[4, 4], [5, 4], [4, 3], [0, 0]]))
    np.testing.assert_array_equal(
        windows[..., 0], [[[1, 2], [3, 4]], [[3, 4], [0, 0]], [[0, 1], [0, 3]], [[0, 0], [0, 0]]]
    )


def test_crop_draws_all_offsets():
    # One bright pixel in the middle of 9x9 ends up in each of the 81 places.
    images = jnp.zeros((4000, 9, 9, 1)).at[:, 4, 4].set(1)
    moved = augment.crop(jax.random.key(0), images)
    counts = np.asarray(moved.sum(0))[..., 0]
    assert counts.sum() == 4000 and counts.min() > 20 and counts.max() < 90


def test_crop_flip_mirrors_half_of_the_crops():
    images = jax.random.uniform(jax.random.key(1), (200, 6, 5, 3))
    key = jax.random.key(0)
    result = augment.crop_flip(key, images)
    crops = augment.crop(jax.random.split(key)[0], images)
    same = jnp.all(result == crops, axis=(1, 2, 3))
    mirrored = jnp.all(result == crops[:, :, ::-1], axis=(1, 2, 3))
    assert bool(jnp.all(same | mirrored)) and 70 < int(mirrored.sum()) < 130


def test_none_changes_nothing():
    images = jnp.ones((2, 3, 3, 1))
    assert augment.AUGMENTATIONS['none'](jax.random.key(0), images) is images


@pytest.mark.parametrize('name', augment.AUGMENTATIONS)
def test_augmentation_is_the_same_on_any_number_of_devices(name):
    images = jax.random.uniform(jax.random.key(1), (8, 6, 5, 3))
    expected = augment.AUGMENTATIONS[name](jax.random.key(0), images)
    count = next(n for n in (4, 2, 1) if n <= jax.device_count())
    mesh = jax.make_mesh(
        (count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    sharded = jax.jit(augment.AUGMENTATIONS[name])(
        jax.random.key(0), jax.device_put(images, sharding)
    )
    np.testing.assert_array_equal(sharded, expected)
