"""Brings the tensors of an EAGLE head to official names: renames them, and takes fused and split ones apart."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.dialects import REFUSED, HeadDialect
from eagle_jax.convert.heads.rules import official_of
from eagle_jax.convert.read import CONFIG, Checkpoint, Tensor, read_ids
from eagle_jax.models.fields import size


def official_tensors(checkpoint: Checkpoint, dialect: HeadDialect) -> Checkpoint:
    """Returns the checkpoint of an EAGLE head with official names for its tensors and faults.

    Raises:
      CheckpointError: two tensors of one official name, or a tensor of a network that is not implemented.
    """
    where, present = str(checkpoint.folder), checkpoint.tensors.keys() | checkpoint.faults.keys()
    for name in sorted(present):
        refused = [what for pattern, what in REFUSED.items() if re.fullmatch(pattern, name.removeprefix(names.PREFIX))]
        if refused:
            raise CheckpointError(f"{where}: tensor {name!r} belongs to {refused[0]}, which is not implemented")
    official = official_names(present, dialect, where)
    tensors = {bare: checkpoint.tensors[name] for bare, name in official.items() if name in checkpoint.tensors}
    faults = {bare: checkpoint.faults[name] for bare, name in official.items() if name in checkpoint.faults}
    for fused, parts in dialect.split.items():
        shares = _shares(len(parts), checkpoint.config)
        for name in [name for name in tensors if f".{fused}." in name]:
            for part, tensor in zip(parts, _slices(tensors[name], shares), strict=True):
                tensors[name.replace(fused, part)] = tensor
            del tensors[name]
    for name, (parts, axis) in dialect.joined.items():
        if all(part in tensors for part in parts):
            tensors[name] = _joined([tensors.pop(part) for part in parts], axis)
    direct = [name for name in (names.REMAP, names.TOKEN_MAP) if name in tensors]
    if len(direct) + (names.DRAFT_TO_TARGET in tensors) > 1:
        raise CheckpointError(f"{where}: {', '.join(direct)} and d2t are tables of one vocabulary; keep one")
    for name in direct:
        tensors[names.DRAFT_TO_TARGET] = _offsets(tensors.pop(name))
    return dataclasses.replace(checkpoint, tensors=tensors, faults=faults)


def official_names(present: Collection[str], dialect: HeadDialect, where: str) -> dict[str, str]:
    """Returns {official name: name in the file}; strips the prefixes of other engines.

    Raises:
      CheckpointError: if two tensors have one official name.
    """
    official: dict[str, str] = {}
    for name in present:
        bare = official_of(name.removeprefix(names.PREFIX).removeprefix(names.PREFIX), dialect.read)
        if bare in official:
            raise CheckpointError(
                f"{where}: {official[bare]!r} and {name!r} stand for the same tensor; remove the one that does "
                "not belong to this head"
            )
        official[bare] = name
    return official


def _shares(count: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the relative sizes of the parts of a fused tensor: of q, k and v by their heads, else equal ones."""
    if count != 3:
        return (1,) * count
    heads = config.get("num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    sizes = [
        size(name, value, CONFIG) for name, value in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads))
    ]
    return sizes[0], sizes[1], sizes[1]


def _slices(tensor: Tensor, shares: tuple[int, ...]) -> list[Tensor]:
    """Takes a fused tensor apart along its first axis."""
    if not tensor.shape or tensor.shape[0] % sum(shares):
        raise CheckpointError(f"{tensor.where} of shape {tensor.shape} does not divide into parts of {list(shares)}")
    ends = np.cumsum(shares) * (tensor.shape[0] // sum(shares))
    return [_rows(tensor, int(start), int(end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _rows(tensor: Tensor, start: int, end: int) -> Tensor:
    """Returns a part of a tensor along its first axis."""
    return dataclasses.replace(tensor, shape=(end - start, *tensor.shape[1:]), load=lambda: tensor.load()[start:end])


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    """Concatenates tensors along an axis."""
    first, shape = parts[0], list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return dataclasses.replace(
        first, shape=tuple(shape), load=lambda: np.concatenate([part.load() for part in parts], axis)
    )


def _offsets(remap: Tensor) -> Tensor:
    """Returns the d2t of a table that holds target ids in place of offsets."""
    return dataclasses.replace(
        remap, dtype="int64", load=lambda: remap.load().astype(np.int64) - np.arange(remap.shape[0])
    )


def with_token_map(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """Gives the checkpoint of an EAGLE-1 head a table of frequent tokens, in place of its own, from a list of ids.

    Args:
      file: a PyTorch file, as CPM.cu and SGLang read them (freq_32768.pt), or JSON.
    Raises:
      CheckpointError: a file that cannot be read, or that holds no list of ids.
    """
    ids = read_ids(file)
    table = Tensor(names.REMAP, file, ids.shape, ids.dtype.name, lambda: ids)
    others = {name: t for name, t in checkpoint.tensors.items() if name.removeprefix(names.PREFIX) not in names.TABLES}
    files = (*checkpoint.files, file)  # a converted folder keeps their checksums
    return dataclasses.replace(checkpoint, tensors=others | {names.REMAP: table}, files=files)
