"""Causal attention of training by the backend's own flash kernel, with the log-sum-exp and a gradient through it.

Letters: B batch, S positions, K key-value heads, G query heads of each, H head dim.

The kernels are JAX's: Pallas's Triton attention on a CUDA GPU, splash attention on a TPU. Both give the log-sum-exp,
neither a gradient through it, which merging with the keys of later steps needs. A second attention has it, one whose
values are the keys. With P = softmax(s q k'), o = P v, l the log-sum-exp and gradients do, dl:

    dq = (that of o) + s dl * (P k)        dk = (that of o) + P' (s dl * q)

and the last term is what the kernel gives as the gradient of the second attention's values for an output's of s dl * q.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

BLOCK = 128  # rows are padded to a multiple of it
LANES = 128  # of a TPU: head dims are padded to a multiple
QKV = "b k g s h, b k s h, b k s h"
Parts = tuple[jax.Array, ...]


class Kernel(NamedTuple):
    """A backend's kernel, causal among positions of the same segment.

    attend: (q [B, K, G, S, H], k, v [B, K, S, H], segments [B, S], *tables, log_sum_exp: bool) -> [B, K, G, S, H], with
      a gradient in q, k and v; or, if `log_sum_exp`, that and the log-sum-exp [B, K, G, S] float32, without one.
    tables: the small arrays it reads besides, for rows of S positions.
    """

    attend: Callable[..., Any]
    tables: Callable[[int], Parts]


def flash_part(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Parts:
    """A part of a softmax: causal attention inside each segment. Has no gradient of its own; see `gradient`.

    Args:
      q: [B, K, G, S, H]. k, v: [B, K, S, H]. segments: [B, S] int32, a number for every position that only its own
        document has.
    Returns:
      As `softmax_part`, [B, K, G, S, 1], [B, K, G, S, 1] and [B, K, G, S, H]: the log-sum-exp in place of the largest
      score, 1 in place of the sum of exponentials, and the normalised result, in q's dtype.
    """
    width = q.shape[3]
    arrays, segments, tables = _whole_blocks(kernel, (q, k, v), segments)
    out, log_sum = _forward(kernel, len(tables))(*arrays, segments, *tables)
    log_sum = log_sum[..., :width, None]
    return log_sum, jnp.ones_like(log_sum), out[..., :width, :]


def gradient(
    kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, of_part: Parts
) -> tuple[jax.Array, ...]:
    """The gradients of `flash_part` in q, k and v, from those of its result."""
    of_log_sum, _, of_out = of_part
    arrays, segments, tables = _whole_blocks(kernel, (q, k, v, of_out, of_log_sum), segments)
    gradients = _backward(kernel, len(tables))(*arrays, segments, *tables)
    return tuple(array[..., : q.shape[3], :] for array in gradients)


def _whole_blocks(kernel, arrays, segments):
    """Arrays [..., S, X] padded to whole blocks of rows; nothing before the padding sees it."""
    more = -segments.shape[1] % BLOCK
    padded = tuple(jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more), (0, 0)]) for a in arrays)
    return padded, jnp.pad(segments, [(0, 0), (0, more)]), kernel.tables(segments.shape[1] + more)


@functools.cache
def _forward(kernel, tables):
    def fn(q, k, v, segments, *tables):
        return kernel.attend(q, k, v, segments, *tables, log_sum_exp=True)

    return _by_row_and_head(fn, QKV, "b k g s h, b k g s", tables)


@functools.cache
def _backward(kernel, tables):
    def fn(q, k, v, of_out, of_log_sum, segments, *tables):
        def attend(q, k, v):
            return kernel.attend(q, k, v, segments, *tables, log_sum_exp=False)

        scaled = of_log_sum * q.shape[-1] ** -0.5
        _, pull = jax.vjp(attend, q, k, v)
        of_q, of_k, of_v = pull(of_out)
        keys, pull = jax.vjp(lambda values: attend(q, k, values), k)
        (more,) = pull((scaled * q).astype(q.dtype))
        return (of_q + scaled * keys).astype(q.dtype), of_k + more, of_v

    return _by_row_and_head(fn, f"{QKV}, b k g s h, b k g s u", QKV, tables)


def _by_row_and_head(fn, arrays, results, tables):
    """`fn` for any mesh: every device does its own rows and heads. A compiler cannot divide a kernel by itself."""
    count = len(arrays.split(","))

    def partition(mesh, args, found):
        spec = (*args[0].sharding.spec, None, None)

        def along(names, shape):
            return NamedSharding(mesh, PartitionSpec(*spec[:names], *[None] * (len(shape.shape) - names)))

        names = [2] * count + [1] + [0] * tables  # rows and heads, rows, whole
        return mesh, fn, tuple(along(2, shape) for shape in found), tuple(map(along, names, args))

    made = custom_partitioning(fn)
    whole = [f", ...{i}" for i in range(tables)]
    made.def_partition(
        partition=partition,
        sharding_rule=f"{arrays}, b s{''.join(whole)} -> {results}",
        need_replication_factors=tuple(name for name in "gshu" if name in arrays),
    )
    return made


def _triton(q, k, v, segments, *, log_sum_exp, interpret=False):
    with warnings.catch_warnings():
        # From jax 0.11 on it points at another package; both versions have it.
        warnings.filterwarnings("ignore", message=".*tokamax", category=DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    def heads_inside(array, groups):  # [B, K, ..., S, H] -> [B, S, K * G, H]
        return jnp.moveaxis(array, 1, 2) if groups == 1 else jnp.repeat(jnp.moveaxis(array, 1, 2), groups, axis=2)

    batch, kv_heads, groups, width, head_dim = q.shape
    flat = q.reshape(batch, kv_heads * groups, width, head_dim)
    result = mha(
        heads_inside(flat, 1),
        heads_inside(k, groups),
        heads_inside(v, groups),
        segments,
        sm_scale=head_dim**-0.5,
        causal=True,
        return_residuals=log_sum_exp,
        interpret=interpret,
    )
    out = jnp.moveaxis(result[0] if log_sum_exp else result, 2, 1).reshape(q.shape)
    return (out, result[1].reshape(q.shape[:-1]) * math.log(2)) if log_sum_exp else out


def _splash(q, k, v, segments, *tables, log_sum_exp, interpret=False):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    batch, kv_heads, groups, width, head_dim = q.shape
    kernel = jax.tree.unflatten(jax.tree.structure(_splash_kernel(width, log_sum_exp, interpret)), tables)
    more = -head_dim % LANES
    q, k, v = (jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)]) for array in (q, k, v))
    flat = (q * head_dim**-0.5).astype(q.dtype).reshape(batch, kv_heads * groups, width, -1)
    result = jax.vmap(kernel)(flat, k, v, SegmentIds(segments, segments))
    out = (result[0] if log_sum_exp else result).reshape(q.shape)[..., :head_dim]
    return (out, result[1][0].reshape(q.shape[:-1])) if log_sum_exp else out


def _splash_tables(width):
    return tuple(jax.tree.leaves(_splash_kernel(width, False, False)))


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


TRITON = Kernel(_triton, lambda width: ())
SPLASH = Kernel(_splash, _splash_tables)
