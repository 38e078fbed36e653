"""Gathers."""

from __future__ import annotations

import jax
from jaxtyping import Array, Int, Shaped


def take_one(values: Shaped[Array, "batch positions ..."], index: Int[Array, " batch"]) -> Shaped[Array, "batch ..."]:
    """Gathers one position of each sequence."""
    return jax.vmap(lambda row, i: row[i])(values, index)
