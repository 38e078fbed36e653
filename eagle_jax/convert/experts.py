"""Experts as checkpoints store them: a tensor for each expert, or packed tensors whose weights may be MXFP4.

A name in a table says which, for a parameter [experts, output, input]:

    mlp.experts.{e}.up_proj.weight       one tensor for each expert e
    mlp.experts.gate_up_proj[up]         part `up` of a tensor [experts, input, outputs]; see PARTS

A packed tensor X may instead be stored as X_blocks and X_scales, in MXFP4; see `dequantised`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import Checkpoint, Tensor

# The outputs of a packed tensor that a part consists of: gates and ups take turns.
PARTS: dict[str, slice] = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}
PART = re.compile(r"(.*)\[(\w+)\]")

# Values of 4-bit floats: a sign, 2 bits of exponent, 1 of mantissa.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpack(checkpoint: Checkpoint, wanted: Collection[str], count: int) -> Checkpoint:
    """Replaces stored tensors by those that `wanted` names; each is made from the files when it is loaded.

    Args:
      wanted: names in a table; names of plain tensors are left alone.
      count: experts in a layer.
    Raises:
      CheckpointError: for tensors of one parameter that do not go together.
    """
    tensors, faults, used = dict(checkpoint.tensors), dict(checkpoint.faults), set()
    for name in wanted:
        stored = _stored(checkpoint, name, count)
        missing = [each for each in stored if each not in checkpoint.tensors]
        if stored == [name]:
            continue
        if missing:
            absent = f"{checkpoint.folder}: tensor {missing[0]!r} is missing; the files are incomplete"
            faults[name] = checkpoint.faults.get(missing[0], absent)
            continue
        sources = [checkpoint.tensors[each] for each in stored]
        tensors[name] = _stack(name, sources) if "{e}" in name else _part(name, sources)
        used |= set(stored)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in used}
    return dataclasses.replace(checkpoint, tensors=tensors, faults=faults)


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes `unpack`: returns the tensors that a checkpoint stores, packed ones in their own dtype."""
    stored: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        part = PART.fullmatch(name)
        if "{e}" in name:
            stored |= {name.replace("{e}", str(e)): expert for e, expert in enumerate(array)}
        elif part:
            outputs = PARTS[part[2]]
            whole = stored.setdefault(part[1], np.empty(_packed_shape(array.shape, outputs), array.dtype))
            _output_first(whole)[:, outputs] = array
        else:
            stored[name] = array
    return stored


def _stored(checkpoint: Checkpoint, name: str, count: int) -> list[str]:
    """Returns the names of the stored tensors that make the tensor `name`; itself if it is a plain one."""
    if "{e}" in name:
        return [name.replace("{e}", str(e)) for e in range(count)]
    part = PART.fullmatch(name)
    if part is None:
        return [name]
    quantised = [f"{part[1]}_blocks", f"{part[1]}_scales"]
    held = checkpoint.tensors.keys() | checkpoint.faults.keys()
    return quantised if any(each in held for each in quantised) else [part[1]]


def _stack(name: str, sources: list[Tensor]) -> Tensor:
    first = sources[0]
    for other in sources:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{other.where} is {other.dtype} {other.shape}, but {first.name!r} is {first.dtype} {first.shape}; "
                "the experts belong to different models"
            )
    shape = (len(sources), *first.shape)
    return Tensor(name, first.file, shape, first.dtype, lambda: np.stack([source.load() for source in sources]))


def _part(name: str, sources: list[Tensor]) -> Tensor:
    """Takes a part of a packed tensor, or of its blocks and scales, outputs before inputs."""
    outputs, first = PARTS[PART.fullmatch(name)[2]], sources[0]  # type: ignore[index]
    if len(sources) == 1:
        if len(first.shape) not in (2, 3):
            raise CheckpointError(f"{first.where} has shape {first.shape}; packed experts have 2 or 3 dimensions")
        shape = _output_first(np.empty(first.shape, np.bool_))[:, outputs].shape
        return Tensor(name, first.file, shape, first.dtype, lambda: _output_first(first.load())[:, outputs])
    blocks, scales = sources
    if (
        (blocks.dtype, scales.dtype) != ("uint8", "uint8")
        or blocks.shape[:-1] != scales.shape
        or len(blocks.shape) != 4
    ):
        raise CheckpointError(
            f"{blocks.where} is {blocks.dtype} {blocks.shape}, its scales {scales.dtype} {scales.shape}; "
            "MXFP4 has bytes [experts, outputs, blocks, bytes of a block], and a scale for each block"
        )
    experts, rows, groups, size = blocks.shape
    shape = (experts, len(range(rows)[outputs]), groups * size * 2)
    return Tensor(
        name,
        blocks.file,
        shape,
        "bfloat16",
        lambda: dequantised(blocks.load()[:, outputs], scales.load()[:, outputs]),
    )


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns MXFP4 weights [experts, outputs, inputs] as bfloat16, which holds all of them exactly.

    Args:
      blocks: uint8 [experts, outputs, blocks, bytes]: two 4-bit floats a byte, the first in its low half.
      scales: uint8 [experts, outputs, blocks]: the exponent of 2 that a block is multiplied by, plus 127.
    """
    experts, outputs, groups, size = blocks.shape
    out = np.empty((experts, outputs, groups, size, 2), ml_dtypes.bfloat16)
    with np.errstate(over="ignore", invalid="ignore"):  # who reads the tensor reports infinity and NaN by name
        for expert in range(experts):  # bounds the temporaries
            factors = np.exp2(scales[expert].astype(np.float32) - 127)[..., None]
            out[expert, ..., 0] = FP4[blocks[expert] & 15] * factors
            out[expert, ..., 1] = FP4[blocks[expert] >> 4] * factors
    return out.reshape(experts, outputs, groups * size * 2)


def _output_first(array: np.ndarray) -> np.ndarray:
    """Turns packed weights [experts, input, outputs]; biases [experts, outputs] are as they should be."""
    return array.swapaxes(1, 2) if array.ndim == 3 else array


def _packed_shape(shape: tuple[int, ...], outputs: slice) -> tuple[int, ...]:
    rows = shape[1] * (outputs.step or 1)
    return (shape[0], shape[2], rows) if len(shape) == 3 else (shape[0], rows)
