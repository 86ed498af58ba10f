"""What happens to images on the device, inside the jitted step: scaling and augmentation.

Randomness comes from one key for the whole batch, so that the result is the same on any number
of devices and of data-loading threads.
"""

import jax
import jax.numpy as jnp

PADDING = 4  # pixels of zeros on each side before a random crop


def to_float(images: jax.Array) -> jax.Array:
    """Returns float32 images in [0, 1] of uint8 images; floats pass unchanged."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def none(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C] as they are."""
    return images


def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns images [B, H, W, C] shifted by up to PADDING pixels, zeros where they have left."""
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * PADDING + 1)
    return crop_at(images, offsets)


def crop_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns randomly cropped images [B, H, W, C], every other one (at random) mirrored."""
    crop_key, flip_key = jax.random.split(key)
    return flip(flip_key, crop(crop_key, images))


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns images [B, H, W, C], every other one (at random) mirrored."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def crop_at(images: jax.Array, offsets: jax.Array) -> jax.Array:
    """Returns the H x W windows at offsets [B, 2] (row, column) of images padded by PADDING zeros.

    An offset of (PADDING, PADDING) is the image itself.
    """
    border = (PADDING, PADDING)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))

    def window(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(window)(padded, offsets)


AUGMENTATIONS = {'none': none, 'flip': flip, 'crop': crop, 'crop_flip': crop_flip}
