"""Gathers.

Letters: B batch, T positions.
"""

from __future__ import annotations

import jax


def take_one(values: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers one position of each sequence: values [B, T, ...] at index [B] -> [B, ...]."""
    return jax.vmap(lambda row, i: row[i])(values, index)
