"""Reads a Hugging Face checkpoint folder, or a GGUF file: its config, and its tensors lazily.

Weights are `.safetensors` or `.bin`: one file or shards, with or without an index. Medusa heads may also be
`medusa_lm_head.pt`; mlc.py reads MLC-LLM's shards. Opening reads headers only. A tensor is mapped or read on demand, so
memory holds about one tensor at a time. Files are not trusted: PyTorch's weights-only reader unpickles, and an index
that names a file outside its folder is refused.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eagle_jax.convert import mlc
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.gguf import checkpoint as gguf
from eagle_jax.convert.hub import MEDUSA_FILE, Hub, first_line, resolve
from eagle_jax.convert.small_files import small_files

# Data types by their safetensors names. Others (float8, ...) keep their name and are not read.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CONFIG = "config.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Describes a tensor in a file by its header; `load` maps or reads it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def where(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Describes an open folder or GGUF file.

    source: the caller's name for it. files: the weight files.
    made: {path: bytes} of config.json and small files that no file holds: all of a GGUF file's, written from its
      metadata, and the config.json of a multimodal model's text part and of MLC's folders.
    faults: {tensor name: why it cannot be read}, such as a missing shard; an error only if a model needs the tensor.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    faults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    made: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        """Returns whether this is a GGUF file."""
        return self.files[0].suffix == ".gguf"

    @property
    def config_path(self) -> Path:
        """Returns the file that holds the config."""
        return self.files[0] if self.is_gguf else self.folder / CONFIG

    @property
    def sized_by(self) -> str:
        """Returns the name of the config in messages."""
        return "its metadata" if self.is_gguf else CONFIG

    def small_files(self) -> list[str]:
        """Returns the paths of the small files, sorted; see `small_files.SMALL_FILES`."""
        return sorted(self.made.keys() - {CONFIG}) if self.is_gguf else small_files(self.folder)

    def read_small(self, path: str) -> bytes:
        """Reads config.json, or one of the small files."""
        return self.made[path] if path in self.made else (self.folder / path).read_bytes()


def open_checkpoint(source: str | Path, hub: Hub | None = None) -> Checkpoint:
    """Opens a local folder, a GGUF file, or a Hugging Face repository, which it downloads.

    Args:
      hub: download options of a repository.
    Raises:
      CheckpointError: naming the missing or damaged file, and what to do about it.
      ConfigError: for a GGUF file of mathematics that is not implemented.
    """
    file = find_gguf(source)
    if file is not None:
        return _open_gguf(source, file)
    folder = resolve(source, hub)
    if not (folder / "config.json").is_file() and (folder / "target" / "config.json").is_file():
        raise CheckpointError(f"{source}: is a converted folder; load it with eagle_jax.load, or name it with --model")
    index = mlc.index_of(folder)
    if index is not None:
        return _open_mlc(source, index)
    config = read_json(folder / CONFIG)
    files, weight_map = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    faults: dict[str, str] = {}
    for file in files:
        found = read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file)
        for name, tensor in found.items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in tensors:
                faults[name] = f"{tensor.where} is also in {tensors[name].file.name}; remove one of the files"
            tensors.setdefault(name, tensor)
    for name in weight_map.keys() - tensors.keys():
        shard = folder / weight_map[name]
        if shard in files:
            faults[name] = f"{shard}: the index says that it holds tensor {name!r}, but it does not"
        else:
            faults[name] = f"{shard}: this shard, which holds tensor {name!r}, is missing; download or copy it again"
    return Checkpoint(str(source), folder, config, tensors, tuple(files), faults)


def find_gguf(source: str | Path) -> Path | None:
    """Returns the GGUF file of a name: itself, or the only one of a folder without other weights; else None."""
    path = Path(source)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin", MEDUSA_FILE)):
        return None
    return gguf.gguf_file(path)


def folder_of(source: str | Path, hub: Hub | None = None, weights: bool = True) -> Path:
    """Returns the folder of a model's config.json and small files; see `resolve`.

    For a GGUF file it writes them to a temporary folder, which is removed when the program ends.
    """
    file = find_gguf(source)
    if file is None:
        return resolve(source, hub, weights)
    return _written(file.resolve(), file.stat().st_mtime_ns)


@functools.cache
def _written(file: Path, changed: int) -> Path:
    """Writes the small files of a GGUF file to a temporary folder, anew if `changed` (mtime in ns) differs."""
    folder = Path(tempfile.mkdtemp(prefix="eagle-jax-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, data in open_checkpoint(file).made.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def _open_gguf(source: str | Path, path: Path) -> Checkpoint:
    described = gguf.describe(path)
    tensors = {name: Tensor(name, path, *rest) for name, rest in described.tensors.items()}
    return Checkpoint(str(source), path.parent, described.config, tensors, (path,), described.faults, described.files)


def _open_mlc(source: str | Path, index: Path) -> Checkpoint:
    described = mlc.describe(index, read_json)
    tensors = {name: Tensor(name, *rest) for name, rest in described.tensors.items()}
    made = {CONFIG: json.dumps(described.config, indent=2).encode()}
    return Checkpoint(str(source), index.parent, described.config, tensors, described.files, described.faults, made)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Returns the weight files to read, and {tensor name: file name} of their index (empty without one).

    `.safetensors` takes precedence over `.bin`, and a file of the standard name over an index that does not list it
    (both as in transformers). An index whose files are all missing is ignored. MEDUSA_FILE is the last choice.
    """
    absent = None
    for single, shards in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin")):
        index = folder / f"{single}.index.json"
        weight_map = read_index(index) if index.is_file() else {}
        named = sorted(set(weight_map.values()))
        if (folder / single).is_file() and single not in named:
            return [folder / single], {}
        # A folder may also hold files that are no shards, such as consolidated.safetensors.
        present = sorted(folder.glob(single.replace(".", "*."))) or sorted(folder.glob(shards))
        missing = [name for name in named or _shards_of(present) if not (folder / name).is_file()]
        listed = [folder / name for name in named if name not in missing]
        if listed:  # some shards may be missing, whose tensors nobody may need
            return listed, weight_map
        if missing and present:
            raise CheckpointError(f"{folder / missing[0]}: this shard is missing; download or copy it again")
        if present:
            return present, weight_map
        absent = absent or (folder / missing[0] if missing else None)
    if (folder / MEDUSA_FILE).is_file():
        return [folder / MEDUSA_FILE], {}
    if absent:
        raise CheckpointError(f"{absent}: this shard is missing; download or copy it again")
    raise CheckpointError(f"{folder}: holds no weights (*.safetensors, *.bin, *.gguf or {MEDUSA_FILE})")


def read_index(path: Path) -> dict[str, str]:
    """Reads {tensor name: file name} of an index; refuses names of files outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; the index is damaged, download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{path}: tensor {name!r} is said to be in {file!r}, which is no weight file")
        if "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path}: tensor {name!r} is said to be in {file!r}, outside the folder; refused")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({first_line(error)}); the file is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected; the file is damaged")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Lists the tensors of a .safetensors file: 8 bytes of header length, a JSON header, then the values.

    Tensors are views of the mapped file. The safetensors package would copy every tensor.
    """
    damaged = "the file is damaged or incomplete, download or copy it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: the header is cut off; {damaged}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON; {damaged}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; {damaged}")
    header.pop("__metadata__", None)
    tensors, used, available = {}, 0, size - 8 - length
    for name, entry in header.items():
        where = f"{path}: tensor {name!r}"
        try:
            kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            valid = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and start <= end
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise CheckpointError(f"{where} has a malformed header entry; {damaged}")
        if end > available:
            raise CheckpointError(f"{where} ends at byte {end} of {available}; {damaged}")
        dtype = DTYPES.get(kind)
        if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{where} has {end - start} bytes for shape {shape} of {dtype.name}; {damaged}")
        used += end - start

        def load(offset=8 + length + start, dtype=dtype, shape=shape) -> np.ndarray:
            if not math.prod(shape):  # an empty array cannot be mapped
                return np.empty(shape, dtype)
            # One map per tensor, so that its pages are released with the tensor.
            return np.require(np.memmap(path, dtype, "r", offset, shape), requirements="A")

        tensors[name] = Tensor(name, path, shape, dtype.name if dtype is not None else kind, load)
    if used != available:
        raise CheckpointError(f"{path}: holds {available} bytes of values, its header describes {used}; {damaged}")
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """Lists the tensors of a PyTorch file, mapped where the format allows it (zip files, since PyTorch 1.6)."""
    torch = _torch(path)
    state = _unpickled(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor")

        def load(value=value) -> np.ndarray:
            value = value.detach().contiguous()
            # PyTorch does not convert bfloat16 to NumPy: pass its bits as int16.
            if value.dtype == torch.bfloat16:
                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        tensors[name] = Tensor(name, path, tuple(value.shape), str(value.dtype).removeprefix("torch."), load)
    return tensors


def read_ids(path: Path) -> np.ndarray:
    """Reads a list of token ids from a PyTorch file, which may hold a tensor, or from JSON."""
    try:
        listed = json.loads(path.read_bytes()) if path.suffix == ".json" else _unpickled(path)
        ids = np.asarray(listed)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no list of token ids ({first_line(error)})") from error
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise CheckpointError(f"{path}: is no list of token ids, but {ids.dtype.name} of shape {ids.shape}")
    return ids.astype(np.int64)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading {path.suffix} files needs PyTorch: pip install eagle-jax[torch]"
        ) from error
    return torch


def _unpickled(path: Path) -> Any:
    """Reads a PyTorch file by the weights-only reader, mapped where the format allows it."""
    torch = _torch(path)
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # unpickling damaged bytes may raise any exception
        raise CheckpointError(
            f"{path}: PyTorch's weights-only reader refuses this file ({first_line(error)}); it is damaged, "
            "incomplete, or holds more than tensors. Download it again, or use a .safetensors file"
        ) from error


def _shards_of(files: list[Path]) -> list[str]:
    """Returns the names of all shards of the series that these files belong to: x-00001-of-00002.bin, ..."""
    names = []
    for file in files:
        series = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)", file.name)
        if series:
            stem, _, count, suffix = series.groups()
            names += [f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
    return sorted(set(names))
