"""What a model and data are, in a few characters: to notice that files were made from others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def of_model(model: Any) -> str:
    """Of a model's config and parameters; the same on any device, and however the parameters are sharded."""
    parts = [repr(getattr(model, "config", None))]
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        sums = np.asarray(_checksums(leaf)).tolist()
        parts.append(f"{jax.tree_util.keystr(path)} {leaf.dtype.name} {list(leaf.shape)} {sums}")
    return of_text("\n".join(parts))


def of_tokenizer(tokenizer: Any) -> str:
    """Of a fast tokenizer with its chat template."""
    return of_text(json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]))


def of_file(path: str | Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_text(text: str) -> str:
    """Of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _checksums(array: jax.Array) -> jax.Array:
    """Two sums [2] uint32 of the entries' bits, mixed with their places: in integers, so that no order matters."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):  # without a reshape, which would gather a sharded array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return jnp.stack([mixed.sum(), (mixed * (place | 1)).sum()])
