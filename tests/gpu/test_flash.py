"""Training's attention in bfloat16, on the GPU by its flash kernel, is near attention in blocks in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.ops.attention import by_backend
from eagle_jax.ops.causal import OwnKV, finished, in_blocks, own_part
from eagle_jax.ops.layout import layout
from eagle_jax.ops.softmax import merge_parts
from eagle_jax.ops.spec import PLAIN
from tests.gpu.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [256, 1000])
def test_flash_attention_and_its_gradients_are_near_float32(device, width):
    keys = jax.random.split(jax.random.key(width), 6)
    shapes = [(2, 2, 4, width, 128), *[(2, 2, width, 128)] * 2, *[(2, width, 2, 3, 128)] * 2]
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=False)]
    weights = jax.random.normal(keys[5], (2, width, 8, 128))
    documents = jnp.stack([jnp.arange(width) // 300, jnp.arange(width) // 700])
    text = layout(jnp.full(2, width), width, documents)

    def by(attend):
        @jax.jit
        def of(q, k, v, own_k, own_v):
            own = OwnKV(own_k, own_v, jnp.int32(2))
            mixed = finished(merge_parts(attend(q, k, v, text, PLAIN), own_part(q, own)))
            return (mixed * weights).sum(), mixed

        return jax.value_and_grad(of, argnums=range(5), has_aux=True)

    with jax.default_matmul_precision("highest"):
        (_, wanted), right = by(in_blocks)(*(array.astype(jnp.float32) for array in arrays))
    (_, ours), gradients = by(by_backend)(*arrays)
    for array, near in zip((ours, *gradients), (wanted, *right), strict=True):
        assert np.abs(np.asarray(array, np.float32) - near).max() <= 0.02 * np.abs(near).max()
