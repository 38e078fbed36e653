"""The backends' flash kernels, interpreted, beside attention in blocks of plain XLA, in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from eagle_jax.ops import flash
from eagle_jax.ops.attention import by_backend
from eagle_jax.ops.causal import in_blocks
from eagle_jax.ops.layout import layout
from eagle_jax.ops.softmax import merge_parts
from eagle_jax.ops.spec import PLAIN, Spec
from eagle_jax.sharding import DATA, FSDP, TENSOR, make_mesh

INTERPRETED = {kernel.__name__: functools.partial(kernel, interpret=True) for kernel in (flash.triton, flash.splash)}


def arrays(batch, kv_heads, groups, width, head_dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(width), 4)
    heads = (batch, kv_heads)
    q = jax.random.normal(keys[0], (*heads, groups, width, head_dim), dtype)
    k, v = (jax.random.normal(key, (*heads, width, head_dim), dtype) for key in keys[1:3])
    documents = jnp.stack([jnp.arange(width) // (50 + 20 * row) for row in range(batch)])
    return (q, k, v), layout(jnp.full(batch, width), width, documents)


def merged(part, other):
    """What a later step makes of its part: merged with another, and normalised; with a gradient through everything."""
    _, total, out = merge_parts(part, other)
    return (jnp.sin(3 * out / total)).sum()


@pytest.mark.parametrize("kernel", INTERPRETED)
@pytest.mark.parametrize(
    "groups, width, head_dim, spec", [(2, 128, 64, PLAIN), (1, 200, 128, Spec(scale=0.15)), (2, 256, 96, PLAIN)]
)
def test_a_kernel_is_attention_in_blocks(kernel, groups, width, head_dim, spec):
    qkv, text = arrays(2, 2, groups, width, head_dim)
    other = (jnp.full((1,) * 5, 0.4), jnp.full((1,) * 5, 3.0), jax.random.normal(jax.random.key(1), qkv[0].shape))
    part = in_blocks(*qkv, text, spec)
    wanted = jax.grad(lambda *qkv: merged(in_blocks(*qkv, text, spec), other), argnums=(0, 1, 2))(*qkv)
    ours = flash.flash_part(INTERPRETED[kernel], *qkv, text, spec)
    np.testing.assert_allclose(ours[0], part[0] + jnp.log(part[1]), atol=1e-5)
    np.testing.assert_allclose(ours[2] / ours[1], part[2] / part[1], atol=1e-5)
    gradients = flash.gradient(INTERPRETED[kernel], *qkv, text, spec, jax.grad(merged)(ours, other))
    for gradient, right in zip(gradients, wanted, strict=True):
        assert np.abs(gradient - right).max() <= 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("kernel", INTERPRETED)
def test_a_mesh_divides_a_kernel_by_rows_and_heads(kernel):
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2})
    qkv, text = arrays(2, 2, 2, 128, 64)
    split = NamedSharding(mesh, PartitionSpec((DATA, FSDP), TENSOR))
    rows = NamedSharding(mesh, PartitionSpec((DATA, FSDP)))

    @jax.jit
    def both(q, k, v, text):
        part = flash.flash_part(INTERPRETED[kernel], q, k, v, text, PLAIN)
        gradients = flash.gradient(INTERPRETED[kernel], q, k, v, text, PLAIN, jax.tree.map(jnp.cos, part))
        return part[0], part[2], *gradients  # part[1] is 1

    alone = both(*qkv, text)
    sharded = both(*jax.device_put(qkv, split), jax.device_put(text, rows))
    assert all(array.sharding.is_equivalent_to(split, array.ndim) for array in sharded)
    for one, other in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_where_no_kernel_is_half_precision_goes_in_blocks():
    qkv, text = arrays(2, 2, 2, 100, 16, jnp.bfloat16)
    part, pull = jax.vjp(lambda *qkv: by_backend(*qkv, text, PLAIN), *qkv)
    wanted, pull_wanted = jax.vjp(lambda *qkv: in_blocks(*qkv, text), *qkv)
    np.testing.assert_allclose(part[2], wanted[2].astype(jnp.bfloat16))
    of_part = jax.tree.map(jnp.cos, part)
    of_wanted = (*of_part[:2], of_part[2].astype(jnp.float32))
    for one, other in zip(pull(of_part), pull_wanted(of_wanted), strict=True):
        np.testing.assert_array_equal(one, other)
