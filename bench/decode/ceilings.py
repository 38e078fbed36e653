"""Measures the device's ceilings: bytes a second of a copy, and FLOPs a second of a matrix product."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax.measure.timing import seconds_of
from eagle_jax.ops.linear import linear

# Bytes of the copied array, and width of the square matrices: large enough to hide caches and launches.
ACCELERATOR = 2**31, 8192
CPU = 2**27, 1024


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """bytes_per_second: read and written, each counted. flops_per_second: in the dtype asked for."""

    bytes_per_second: float
    flops_per_second: float


def measure_ceilings(dtype: Any, repeats: int) -> Ceilings:
    """Measures both on JAX's first device, medians; float32 products are true float32, like the models'."""
    size, width = CPU if jax.default_backend() == "cpu" else ACCELERATOR
    itemsize = jnp.dtype(dtype).itemsize
    array = jnp.ones(size // itemsize, dtype)
    copying, *_ = seconds_of(lambda fixed, small, kept: ((), -kept), (), (), array, repeats)
    matrix, rows = jax.random.normal(jax.random.key(0), (2, width, width), dtype)

    def multiply(fixed, small, kept):  # scaled, so that numbers stay of one size
        return (), linear(kept, fixed) * jnp.asarray(width**-0.5, kept.dtype)

    multiplying, *_ = seconds_of(multiply, matrix, (), rows, repeats)
    return Ceilings(2 * size / copying, 2 * width**3 / multiplying)
