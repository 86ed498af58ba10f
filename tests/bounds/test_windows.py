import jax
import numpy as np

from robustprune_jax.bounds.windows import BLOCK, product, windows


def test_the_product_and_its_gradient_are_the_dense_matrix_s():
    rng = np.random.default_rng(0)
    matrix = np.zeros((3 * BLOCK, 100), np.float32)
    for i in range(2 * BLOCK):  # the last block is all zeros
        matrix[i, i : i + 6] = rng.normal(size=6)
    found = windows(matrix)
    assert found.values.shape[2] < 50
    rows, weights = rng.normal(size=(2, 5, 100)).astype(np.float32)
    rows = rows[:, : 3 * BLOCK]
    value, gradient = jax.value_and_grad(lambda r: (product(r, found, 100) * weights).sum())(rows)
    np.testing.assert_allclose(value, (rows @ matrix * weights).sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient, weights @ matrix.T, atol=1e-4)
