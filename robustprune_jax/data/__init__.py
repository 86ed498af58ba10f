"""Images: where they come from (sources), how they reach the device (batches), what is done to
them there (augment).

`load(config.dataset)` returns uint8 arrays in host memory, or, of large images, what decodes them
on demand; `batches.train_batches` and `batches.eval_batches` cut them; `augment.to_float` and
`augment.AUGMENTATIONS` run inside the jitted step.
"""

from robustprune_jax.data.sources import SOURCES, Split, Splits, first_test_images, load

__all__ = ['SOURCES', 'Split', 'Splits', 'first_test_images', 'load']
