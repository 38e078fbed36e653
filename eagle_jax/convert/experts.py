"""Experts as checkpoints store them: a tensor for each expert, or packed tensors whose weights may be MXFP4.

A name in a table says which, for a parameter [experts, output, input]:

    mlp.experts.{e}.up_proj.weight       one tensor for each expert e
    mlp.experts.gate_up_proj[up]         part `up` of a tensor [experts, input, outputs]; see PARTS

Instead of a tensor for each expert, a file may hold the tensors of all experts, as transformers writes them on demand;
see FUSED. A packed tensor X may instead be stored as X_blocks and X_scales, in MXFP4; see `dequantised`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Set

import ml_dtypes
import numpy as np

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import Checkpoint, Tensor

# The outputs of a packed tensor that a part consists of: gates and ups take turns.
PARTS: dict[str, slice] = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}
PART = re.compile(r"(.*)\[(\w+)\]")

# A tensor of one expert: that of all experts [experts, outputs, inputs] in its place, and its part of the outputs.
FUSED: dict[str, tuple[str, int, int]] = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0, 2)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1, 2)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0, 1)),
}
EACH = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.\{e\}\.(\w+)\.weight")
# Such files name Mixtral's router otherwise, too.
ROUTER, FUSED_ROUTER = "block_sparse_moe.gate.weight", "mlp.gate.weight"

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
    held = checkpoint.tensors.keys() | checkpoint.faults.keys()
    for name in wanted:
        stored = _stored(held, name, count)
        missing = [each for each in stored if each not in checkpoint.tensors]
        if stored == [name]:
            continue
        if missing:
            absent = f"{checkpoint.folder}: tensor {missing[0]!r} is missing; the files are incomplete"
            faults[name] = checkpoint.faults.get(missing[0], absent)
            continue
        sources = [checkpoint.tensors[each] for each in stored]
        tensors[name] = _made(name, sources)
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


def _stored(held: Set[str], name: str, count: int) -> list[str]:
    """Returns the names of the stored tensors that make the tensor `name`; itself if it is a plain one."""
    if "{e}" in name:
        each = [name.replace("{e}", str(e)) for e in range(count)]
        fused = _fused_name(name)
        return [fused] if fused is not None and fused in held and not held & set(each) else each
    if name.endswith(ROUTER) and name not in held:
        fused = name.removesuffix(ROUTER) + FUSED_ROUTER
        return [fused] if fused in held else [name]
    part = PART.fullmatch(name)
    if part is None:
        return [name]
    quantised = [f"{part[1]}_blocks", f"{part[1]}_scales"]
    return quantised if any(each in held for each in quantised) else [part[1]]


def _fused_name(name: str) -> str | None:
    """Returns the name of the tensor of all experts in place of `name`, a tensor of each."""
    match = EACH.fullmatch(name)
    return f"{match[1]}.mlp.experts.{FUSED[match[2]][0]}" if match and match[2] in FUSED else None


def _made(name: str, sources: list[Tensor]) -> Tensor:
    """Makes the tensor `name` of the stored ones."""
    first = sources[0]
    if PART.fullmatch(name):
        return _part(name, sources)
    if name.endswith(ROUTER):
        return first
    if first.name != _fused_name(name):
        return _stack(name, sources)
    _, part, parts = FUSED[EACH.fullmatch(name)[2]]  # type: ignore[index]
    if len(first.shape) != 3 or first.shape[1] % parts:
        raise CheckpointError(f"{first.where} of shape {first.shape} does not divide into {parts} parts of its outputs")
    rows = first.shape[1] // parts
    shape = (first.shape[0], rows, first.shape[2])
    return Tensor(name, first.file, shape, first.dtype, lambda: first.load()[:, part * rows : (part + 1) * rows])


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
