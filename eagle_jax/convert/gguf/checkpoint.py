"""Describes a GGUF file as a model's folder: what its config.json and tokenizer files would hold, and its tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.gguf import tensors
from eagle_jax.convert.gguf.config import ROPE_FACTORS, config_of
from eagle_jax.convert.gguf.header import read_header
from eagle_jax.convert.gguf.tokenizer import tokenizer_files

PARTS = "split.count"


@dataclasses.dataclass(frozen=True)
class Described:
    """Holds the contents of an open GGUF file.

    config: what config.json would hold. files: {path in a model's folder: bytes}, config.json among them.
    tensors: {name in the file: (shape, dtype, how it is read)}. faults: {name: why it cannot be read}.
    """

    config: dict[str, Any]
    files: dict[str, bytes]
    tensors: dict[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]]
    faults: dict[str, str]


def describe(path: Path) -> Described:
    """Opens a GGUF file; reads its header only.

    Raises:
      CheckpointError: a damaged file, one part of several, or another architecture.
      ConfigError: mathematics that is not implemented.
    """
    header = read_header(path)
    parts = header.metadata.get(PARTS, 0)
    if type(parts) is int and parts > 1:
        raise CheckpointError(f"{path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge")
    config = config_of(header, lambda: tensors.reader(header, ROPE_FACTORS, None)[1]())
    found: dict[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]] = {}
    faults: dict[str, str] = {}
    for name in header.entries.keys() - {ROPE_FACTORS}:
        try:
            found[name] = (header.entries[name].shape, *tensors.reader(header, name, _heads(name, config)))
        except CheckpointError as error:
            faults[name] = str(error)
    text = json.dumps(config, indent=2)
    return Described(config, {"config.json": text.encode(), **tokenizer_files(header)}, found, faults)


def gguf_file(folder: Path) -> Path | None:
    """Returns the only GGUF file of a folder; None if it holds none.

    Raises:
      CheckpointError: if there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder}: holds several GGUF files ({names}); name one of them")
    return files[0] if files else None


def _heads(name: str, config: dict[str, Any]) -> int | None:
    """Returns the number of heads of a tensor with interleaved rows; None for all other tensors."""
    rotated = tensors.ROTATED.fullmatch(name)
    if rotated is None:
        return None
    queries = config["num_attention_heads"]
    heads = queries if rotated[1] == "q" else config.get("num_key_value_heads", queries)
    return heads if type(heads) is int and heads > 0 else None  # refused where the config is read
