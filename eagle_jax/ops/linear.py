"""Weights, and products with them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

CPU_FEW_ROWS = 8  # up to so many rows a CPU multiplies one at a time, with a weight stored output first
CPU_EIGEN_ROWS = 16  # up to so many rows Eigen multiplies faster than YNNPACK, with a weight stored input first


def dot(equation: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """Computes `einsum` in the operands' own precision: float32 is not rounded to TF32 or bfloat16 on GPUs and TPUs."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=out_dtype or x.dtype)


class Weight(nnx.Param):
    """A parameter [..., input] that knows how it multiplies. A subclass may store it in another layout."""

    @property
    def input_size(self) -> int:
        """The length of the input axis, in any layout."""
        return self.shape[-1]

    def multiply(self, x: Float[Array, "... input"], out_dtype: Any = None) -> Float[Array, ...]:
        """Multiplies x by the weight: [..., the weight's other axes].

        Flattens both operands to matrices: XLA:CPU transposes a weight of higher rank on every call, and its gradient
        is twice as slow. A CPU multiplies 2 to CPU_FEW_ROWS rows one at a time, as plain decoding does: a small matmul
        would transpose the weight first.
        """
        stored, rows = self[...], x.reshape(-1, x.shape[-1])
        matrix = stored.reshape(-1, stored.shape[-1])
        together = functools.partial(dot, "rd,fd->rf", out_dtype=out_dtype)

        def one_by_one(rows, matrix):
            return jax.lax.map(lambda row: together(row[None], matrix)[0], rows)

        if 1 < len(rows) <= CPU_FEW_ROWS:
            out = jax.lax.platform_dependent(rows, matrix, cpu=one_by_one, default=together)
        else:
            out = together(rows, matrix)
        return out.reshape(*x.shape[:-1], *stored.shape[:-1])

    def input_first(self) -> InputFirst:
        """Copies the weight into the layout of `InputFirst`."""
        value = self[...]
        if isinstance(value, jax.core.Tracer):
            return InputFirst(jnp.moveaxis(value, -1, 0))
        # NumPy transposes without compiling; JAX would compile a program for every shape.
        return InputFirst(jnp.asarray(np.ascontiguousarray(np.moveaxis(np.asarray(value), -1, 0))))


class InputFirst(Weight):
    """A weight stored as [input, ...]: XLA:CPU multiplies a few rows by this layout without transposing it."""

    @property
    def input_size(self) -> int:
        return self.shape[0]

    def multiply(self, x: Float[Array, "... input"], out_dtype: Any = None) -> Float[Array, ...]:
        stored, rows = self[...], x.reshape(-1, x.shape[-1])
        matrix = stored.reshape(len(stored), -1)
        if 1 < len(rows) <= CPU_EIGEN_ROWS and rows.dtype == jnp.float32:
            # XLA:CPU dispatches this transposed product to Eigen, and rows @ weight to YNNPACK. Without the barrier it
            # would fold the transpose back into rows @ weight.
            out = dot("dr,df->rf", jax.lax.optimization_barrier(rows.T), matrix, out_dtype)
        else:
            out = dot("rd,df->rf", rows, matrix, out_dtype)
        return out.reshape(*x.shape[:-1], *stored.shape[1:])

    def input_first(self) -> InputFirst:
        return self


def linear(
    x: Float[Array, "... input"], weight: Float[Array, "... input"] | nnx.Param, out_dtype: Any = None
) -> Float[Array, ...]:
    """Multiplies x by a weight: [..., the weight's other axes].

    A plain array [..., input] multiplies as a `Weight` does, and so does an embedding that is the output matrix, too.
    """
    return (weight if isinstance(weight, Weight) else Weight(weight[...])).multiply(x, out_dtype)
