"""What tests look at in the files of a run."""

import jax
import numpy as np

from robustprune_jax.training import checkpoint


def weights(path):
    return checkpoint.load(path)[0]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
