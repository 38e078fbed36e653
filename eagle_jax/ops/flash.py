"""Causal attention by JAX's flash kernels, with the log-sum-exp and a gradient through it.

The kernels are Pallas's Triton attention on a CUDA GPU and splash attention on a TPU. Both return the log-sum-exp.
Neither has a gradient through it, which merging with the keys of later steps needs. A second attention supplies it: one
whose values are the keys. With P = softmax(s q k'), o = P v, l the log-sum-exp, and gradients do and dl:

    dq = (that of o) + s dl * (P k)        dk = (that of o) + P' (s dl * q)

P k is the second attention's output. P' (s dl * q) is the gradient of its values if its output has gradient s dl * q.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from eagle_jax.ops.layout import Layout
from eagle_jax.ops.softmax import GroupedQueries, Keys, Part
from eagle_jax.ops.spec import Spec
from eagle_jax.sharding import CACHE_RULE, fitting, mesh_of

BLOCK = 128  # sequences are padded to a multiple
NARROWEST = 16  # the smallest head dim that Triton multiplies
LANES = 128  # a TPU's lanes; head dims are padded to a multiple

# Causal attention among positions of the same segment: (q, k, v, segments [batch, positions], scale, log_sum_exp) ->
# the shape of q, with a gradient in q, k and v. If log_sum_exp, it also returns the log-sum-exp, float32
# [batch, kv_heads, groups, positions], and has no gradient.
Kernel = Callable[..., Any]


def supports(spec: Spec, q: Float[Array, ...]) -> bool:
    """Returns whether the kernels compute a spec: any scale and sinks (which are merged later), no window or softcap.

    The gradient through the log-sum-exp above needs scores that are linear in q and k.
    """
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] >= NARROWEST
    return fits and spec.window is None and spec.softcap is None


def flash_part(kernel: Kernel, q: GroupedQueries, k: Keys, v: Keys, text: Layout, spec: Spec) -> Part:
    """Computes a part of a softmax: causal attention inside each document. `gradient` is its backward pass.

    Args:
      text: `first` serves as segment ids.
    Returns:
      [batch, kv_heads, groups, positions, ...]. The log-sum-exp stands in place of the largest score, and 1 in place of
      the sum of exponentials. The values are normalised, in q's dtype.
    """

    def attend(segments, q, k, v):
        out, log_sum = kernel(q, k, v, segments, scale=spec.scale_of(q.shape[-1]), log_sum_exp=True)
        return log_sum[..., None], out

    log_sum, out = _by_row_and_head(attend, 2, text.first, q, k, v)
    return log_sum, jnp.ones_like(log_sum), out


def gradient(
    kernel: Kernel, q: GroupedQueries, k: Keys, v: Keys, text: Layout, spec: Spec, of_part: Part
) -> tuple[GroupedQueries, Keys, Keys]:
    """Returns the gradients in q, k and v from that of `flash_part`'s result."""
    scale = spec.scale_of(q.shape[-1])

    def of_rows(segments, q, k, v, of_log_sum, of_out):
        def attend(q, k, v):
            return kernel(q, k, v, segments, scale=scale, log_sum_exp=False)

        scaled = of_log_sum * scale
        _, pull = jax.vjp(attend, q, k, v)
        of_q, of_k, of_v = pull(of_out)
        keys, pull = jax.vjp(lambda values: attend(q, k, values), k)
        (more,) = pull((scaled * q).astype(q.dtype))
        return (of_q + scaled * keys).astype(q.dtype), of_k + more, of_v

    of_log_sum, _, of_out = of_part
    return _by_row_and_head(of_rows, 3, text.first, q, k, v, of_log_sum, of_out)


def _by_row_and_head(fn, results, segments, *arrays):
    """Calls fn(segments, *arrays) with positions padded to whole blocks, sharded by sequences and heads on a mesh.

    A compiler cannot shard a kernel by itself.
    """
    more = -segments.shape[1] % BLOCK  # causality hides the padding from all before it
    padded = [jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, more), (0, 0)]) for array in arrays]
    segments, width = jnp.pad(segments, [(0, 0), (0, more)]), segments.shape[1]
    mesh = mesh_of(arrays[1])
    if mesh is not None:
        heads = fitting(CACHE_RULE[:2], arrays[1].shape[:2], mesh)
        specs = PartitionSpec(heads[0]), *[heads] * len(arrays)
        fn = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=(heads,) * results, check_vma=False)
    return tuple(array[..., :width, :] for array in fn(segments, *padded))


def triton(q, k, v, segments, *, scale, log_sum_exp, interpret=False):
    """Calls Pallas's Triton attention, on a CUDA GPU."""
    with warnings.catch_warnings():
        # From jax 0.11 on this import warns and names another package, but still works.
        warnings.filterwarnings("ignore", message=".*tokamax", category=DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    def heads_inside(array, groups):  # -> [batch, positions, heads, head_dim]
        return jnp.moveaxis(array, 1, 2) if groups == 1 else jnp.repeat(jnp.moveaxis(array, 1, 2), groups, axis=2)

    batch, kv_heads, groups, width, head_dim = q.shape
    flat = q.reshape(batch, kv_heads * groups, width, head_dim)
    result = mha(
        heads_inside(flat, 1),
        heads_inside(k, groups),
        heads_inside(v, groups),
        segments,
        sm_scale=scale,
        causal=True,
        return_residuals=log_sum_exp,
        interpret=interpret,
    )
    out = jnp.moveaxis(result[0] if log_sum_exp else result, 2, 1).reshape(q.shape)
    return (out, result[1].reshape(q.shape[:-1]) * math.log(2)) if log_sum_exp else out


def splash(q, k, v, segments, *, scale, log_sum_exp, interpret=False):
    """Calls splash attention, on a TPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    batch, kv_heads, groups, width, head_dim = q.shape
    kernel = _splash_kernel(width, log_sum_exp, interpret)
    more = -head_dim % LANES
    q, k, v = (jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)]) for array in (q, k, v))
    flat = (q * scale).astype(q.dtype).reshape(batch, kv_heads * groups, width, -1)
    result = jax.vmap(kernel)(flat, k, v, SegmentIds(segments, segments))
    out = (result[0] if log_sum_exp else result).reshape(q.shape)[..., :head_dim]
    return (out, result[1][0].reshape(q.shape[:-1])) if log_sum_exp else out


@functools.cache
def _splash_kernel(width, log_sum_exp, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    block = next(rows for rows in (4 * BLOCK, 2 * BLOCK, BLOCK) if width % rows == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mha(
            mask.MultiHeadMask([mask.CausalMask((width, width))]),  # the same for every head
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            save_residuals=log_sum_exp,
            interpret=interpret,
        )
