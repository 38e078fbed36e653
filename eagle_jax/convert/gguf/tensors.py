"""Reads tensors of a GGUF file, each when it is asked for: mapped, or dequantised by the package gguf."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.gguf.header import Entry, Header

# Types that hold plain numbers, by their number in the format.
PLAIN: dict[int, np.dtype] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}

# Queries and keys; the file interleaves the two halves of each head's rows.
ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")

Load = Callable[[], np.ndarray]


def reader(header: Header, name: str, heads: int | None) -> tuple[str, Load]:
    """Returns the dtype of a tensor, and the function that reads it.

    Args:
      heads: of a tensor of ROTATED: how many heads its rows divide into.
    Raises:
      CheckpointError: if its bytes are not all in the file, or its type is not read.
    """
    entry, where = header.entries[name], f"{header.path}: tensor {name!r}"
    dtype, count = _layout(entry, where)
    if entry.offset + count > header.size:
        raise CheckpointError(
            f"{where} ends at byte {entry.offset + count} of {header.size}; the file is incomplete, "
            "download or copy it again"
        )
    load = functools.partial(_load, header.path, entry, count)
    if heads is None:
        return dtype, load
    if not entry.shape or entry.shape[0] % (2 * heads):
        raise CheckpointError(f"{where} has shape {entry.shape}, which does not divide into {heads} heads")
    return dtype, lambda: _halves(load(), heads)


def _layout(entry: Entry, where: str) -> tuple[str, int]:
    """Returns the dtype that an entry is read as, and its bytes in the file."""
    if entry.type in PLAIN:
        return PLAIN[entry.type].name, math.prod(entry.shape) * PLAIN[entry.type].itemsize
    block, size = _blocks(entry.type, where)
    if not entry.shape or entry.shape[-1] % block:
        raise CheckpointError(f"{where} has shape {entry.shape}, which does not divide into blocks of {block}")
    return "float32", math.prod(entry.shape) // block * size


def _blocks(type: int, where: str) -> tuple[int, int]:
    """Returns the values and the bytes of a quantisation's block."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{where} is quantised, which the package gguf reads: pip install 'eagle-jax[gguf]'"
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(type)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where} is of type {type}, which the package gguf does not know; upgrade it") from error
    except NotImplementedError as error:
        raise CheckpointError(f"{where} is of type {kind.name}, which the package gguf does not dequantise") from error
    return block, size


def _load(path: Path, entry: Entry, count: int) -> np.ndarray:
    if not math.prod(entry.shape):  # an empty array cannot be mapped
        return np.empty(entry.shape, PLAIN.get(entry.type, np.float32))
    # A map for each tensor, which releases its pages with the tensor.
    values = np.memmap(path, np.uint8, "r", entry.offset, (count,))
    if entry.type in PLAIN:
        return values.view(PLAIN[entry.type]).reshape(entry.shape)
    import gguf

    rows = values.reshape(*entry.shape[:-1], -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType(entry.type)).reshape(entry.shape)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the interleaving of queries and keys: the file has them in pairs, (x0, y0), (x1, y1), ... per head.

    8 rows, 2 heads, in the file:  0 2 1 3 | 4 6 5 7        returned:  0 1 2 3 | 4 5 6 7
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
