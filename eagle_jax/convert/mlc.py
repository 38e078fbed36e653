"""Reads the parameter shards that MLC-LLM's convert_weight writes of an EAGLE head, unquantised.

mlc-chat-config.json     the head's sizes, in model_config
ndarray-cache.json       the tensors of every shard: name, shape, dtype, offset (tensor-cache.json in newer files)
params_shard_0.bin ...   their bytes, one after the other
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eagle_jax.convert.error import CheckpointError

CONFIG = "mlc-chat-config.json"
INDICES = ("tensor-cache.json", "ndarray-cache.json")
PLAIN = ("q0f16", "q0f32", "q0bf16")  # names of a quantisation that is none
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "int8", "int32", "int64", "uint8")}
DTYPES |= {"bfloat16": np.dtype(ml_dtypes.bfloat16), "uint32": np.dtype(np.uint32)}
AS_BFLOAT16 = "f32-to-bf16"  # float32 that is stored as bfloat16
# Fields that are 0 where they are not set, by the official names that they have here.
SPELLINGS = {
    "position_embedding_base": "rope_theta",
    "context_window_size": "max_position_embeddings",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclasses.dataclass(frozen=True)
class Described:
    """Holds a folder's config, its tensors {name: (file, shape, dtype, load)}, and the faults of missing shards."""

    config: dict[str, Any]
    tensors: dict[str, tuple[Path, tuple[int, ...], str, Callable[[], np.ndarray]]]
    files: tuple[Path, ...]
    faults: dict[str, str]


def index_of(folder: Path) -> Path | None:
    """Returns the index of a folder with MLC's shards and no other weights; None for another folder."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    return next((folder / name for name in INDICES if (folder / name).is_file()), None)


def describe(index: Path, read_json: Callable[[Path], dict[str, Any]]) -> Described:
    """Lists the tensors of an index, and reads the config beside it.

    Raises:
      CheckpointError: for a damaged index or shard, quantised weights, or a model that is no EAGLE head.
    """
    config = _config(read_json(index.parent / CONFIG), index.parent / CONFIG)
    found = Described(config, {}, (), {})
    files = []
    for shard in _listed(read_json(index), index, "the index"):
        name, size = shard.get("dataPath"), shard.get("nbytes")
        if not isinstance(name, str) or Path(name).suffix != ".bin" or {"/", "\\", "\0"}.intersection(name):
            raise CheckpointError(f"{index}: names the shard {name!r}, which is no .bin file of this folder; refused")
        if shard.get("format") != "raw-shard":
            raise CheckpointError(f"{index}: {name} has format {shard.get('format')!r}, known is 'raw-shard'")
        if type(size) is not int:
            raise CheckpointError(f"{index}: {name} has nbytes {size!r}; the index is damaged, download it again")
        file = index.parent / name
        if file.is_file() and file.stat().st_size != size:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, {index.name} says {size}; copy it again")
        files += [file] if file.is_file() else []
        for record in _listed(shard, index, name):
            _add(found, record, file, size, index)
    if not files:
        raise CheckpointError(f"{index}: names no shard that is there; download or copy the folder again")
    return dataclasses.replace(found, files=(*files, index))


def _config(hf: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Returns the fields of the head under the names of config.json."""
    kind, quantisation, fields = (hf.get(name) for name in ("model_type", "quantization", "model_config"))
    if kind != "eagle" or not isinstance(fields, Mapping):
        raise CheckpointError(f"{where}: model_type is {kind!r}; of MLC's folders only EAGLE heads ('eagle') are read")
    if quantisation not in PLAIN:
        raise CheckpointError(
            f"{where}: quantization {quantisation!r} is not implemented (read are {', '.join(PLAIN)}); name the head "
            "that was converted"
        )
    others = fields.get("kwargs")
    flat = {name: value for name, value in fields.items() if name != "kwargs"}
    flat = {**(others if isinstance(others, Mapping) else {}), **flat}
    return {SPELLINGS.get(name, name): value for name, value in flat.items() if name not in SPELLINGS or value != 0}


def _listed(holder: Mapping[str, Any], index: Path, what: str) -> Iterator[Mapping[str, Any]]:
    """Yields the records of the index or of a shard."""
    records = holder.get("records")
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise CheckpointError(f"{index}: {what} has no list of records; the index is damaged, download it again")
    yield from records


def _add(found: Described, record: Mapping[str, Any], file: Path, size: int, index: Path) -> None:
    """Adds a tensor, checked, or the fault that its shard is missing."""
    entry: list[Any] = [record.get(key) for key in ("name", "shape", "dtype", "byteOffset", "nbytes")]
    name, shape, dtype, offset, count = entry
    numbers = (*shape, offset, count) if isinstance(shape, list) else (None,)
    if not isinstance(name, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{index}: has a malformed entry {json.dumps(record)[:200]}; download it again")
    where = f"{index}: tensor {name!r}"
    if name in found.tensors or name in found.faults:
        raise CheckpointError(f"{where} is listed twice; the index is damaged")
    stored = DTYPES.get(str(dtype))
    if stored is None or record.get("format") not in ("raw", AS_BFLOAT16):
        raise CheckpointError(f"{where} is of dtype {dtype!r}, format {record.get('format')!r}, which are not read")
    short = record["format"] == AS_BFLOAT16 and dtype == "float32"
    stored = DTYPES["bfloat16"] if short else stored
    if count != math.prod(shape) * stored.itemsize or offset + count > size:
        raise CheckpointError(
            f"{where} has {count} bytes at {offset} of {size} for shape {shape}; the index is damaged"
        )
    if not file.is_file():
        found.faults[name] = f"{file}: this shard, which holds tensor {name!r}, is missing; download or copy it again"
        return

    def load() -> np.ndarray:
        if not math.prod(shape):  # an empty array cannot be mapped
            return np.empty(shape, dtype)
        mapped = np.require(np.memmap(file, stored, "r", offset, tuple(shape)), requirements="A")
        return mapped.astype(np.float32) if short else mapped

    found.tensors[name] = file, tuple(shape), str(dtype), load
