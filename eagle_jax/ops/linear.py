"""Weights, and products with them.

Letters: D input width of a weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

CPU_FEW_ROWS = 8  # rows of a product that a CPU goes through one by one
CPU_EIGEN_ROWS = 16  # rows that a CPU multiplies faster by Eigen than by YNNPACK, with a weight stored input first


def dot(equation: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`einsum` in the operands' own precision: float32 stays float32 on GPUs and TPUs too."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=out_dtype or x.dtype)


class InputFirst(nnx.Param):
    """A weight [..., D] stored as [D, ...]: see `input_first`."""


def input_size(weight: nnx.Param) -> int:
    """D of a weight [..., D], however it is stored."""
    return weight.shape[0 if isinstance(weight, InputFirst) else -1]


def linear(x: jax.Array, weight: jax.Array | nnx.Param, out_dtype: Any = None) -> jax.Array:
    """x [..., D] times a weight [..., D]: [..., the weight's other dimensions].

    As a product of two matrices, whatever the dimensions: a CPU copies a weight that has more of them, at every
    product, and takes twice as long over the gradient of an x that has more. A few rows a CPU multiplies one by one,
    as in plain decoding, which takes less time: it would rearrange the weight for them, unless `input_first` did.
    """
    rows, stored = x.reshape(-1, x.shape[-1]), weight[...]
    if isinstance(weight, InputFirst):
        matrix = stored.reshape(len(stored), -1)
        if 1 < len(rows) <= CPU_EIGEN_ROWS and rows.dtype == jnp.float32:
            # XLA:CPU gives this transposed form to Eigen, and a product rows @ weight to YNNPACK.
            out = dot("dr,df->rf", jax.lax.optimization_barrier(rows.T), matrix, out_dtype)
        else:
            out = dot("rd,df->rf", rows, matrix, out_dtype)
        return out.reshape(*x.shape[:-1], *stored.shape[1:])
    matrix = stored.reshape(-1, stored.shape[-1])
    together = functools.partial(dot, "rd,fd->rf", out_dtype=out_dtype)

    def one_by_one(rows, matrix):
        return jax.lax.map(lambda row: together(row[None], matrix)[0], rows)

    if 1 < len(rows) <= CPU_FEW_ROWS:
        out = jax.lax.platform_dependent(rows, matrix, cpu=one_by_one, default=together)
    else:
        out = together(rows, matrix)
    return out.reshape(*x.shape[:-1], *stored.shape[:-1])
