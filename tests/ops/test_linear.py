"""Products with weights, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.ops import linear


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("shape", [(24,), (3, 8)])
def test_a_product_with_a_weight_is_that_of_two_matrices(rows, shape):
    rng = np.random.default_rng(rows)
    x, weight = rng.normal(size=(1, rows, 16)), rng.normal(size=(*shape, 16))
    wanted = np.tensordot(x, weight, axes=(-1, -1))
    got = jax.jit(linear.linear)(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    assert got.shape == (1, rows, *shape)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shape", [(24,), (3, 8)])
def test_a_weight_stored_input_first_multiplies_as_it_did(rows, shape):
    rng = np.random.default_rng(rows)
    x, weight = rng.normal(size=(1, rows, 16)), rng.normal(size=(*shape, 16))
    plain = linear.Weight(jnp.asarray(weight, jnp.float32))
    stored = plain.input_first()
    assert (stored.shape, stored.input_size, plain.input_size) == ((16, *shape), 16, 16)
    got = jax.jit(linear.linear)(jnp.asarray(x, jnp.float32), stored)
    np.testing.assert_allclose(got, np.tensordot(x, weight, axes=(-1, -1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, linear.CPU_EIGEN_ROWS])
def test_few_rows_go_to_eigen_whatever_the_library_that_xla_prefers(rows):
    """Eigen takes less time for them. YNNPACK gets no product whose left side has its rows last."""
    x, weight = jnp.ones((1, rows, 64)), linear.InputFirst(jnp.ones((64, 128)))
    text = jax.jit(linear.linear).lower(x, weight).compile().as_text()
    assert "ynn" not in text and " dot(" in text
    assert "ynn" in jax.jit(jnp.dot).lower(x[0], weight[...]).compile().as_text()


def test_a_cpu_rounds_few_rows_as_it_rounds_one():
    """So the logits of a small tree's products are those of plain decoding, bit for bit with jax 0.10."""
    keys = jax.random.split(jax.random.key(0))
    x, weight = jax.random.normal(keys[0], (1, linear.CPU_FEW_ROWS, 192)), jax.random.normal(keys[1], (512, 192))
    together = jax.jit(linear.linear)(x, weight)
    for row in range(linear.CPU_FEW_ROWS):
        alone = jax.jit(linear.linear)(x[:, row], weight)
        if jax.__version_info__ < (0, 11):
            np.testing.assert_array_equal(together[:, row], alone)
        else:  # later releases compile a row in a loop otherwise than a row alone: the last bits differ
            np.testing.assert_allclose(together[:, row], alone, atol=2e-5)


def test_a_product_of_few_rows_has_a_gradient():
    x, weight = jnp.ones((1, 2, 4)), jnp.arange(12.0).reshape(3, 4)
    gradients = jax.jit(jax.grad(lambda x, w: linear.linear(x, w).sum(), (0, 1)))(x, weight)
    np.testing.assert_allclose(gradients[0], np.broadcast_to(weight.sum(0), (1, 2, 4)))
    np.testing.assert_allclose(gradients[1], np.full((3, 4), 2.0))
