"""Reading a Hugging Face checkpoint folder, or a GGUF file: config.json and lazily read tensors.

Weights come as `.safetensors` or `.bin`, one file or shards, with or without an index; Medusa heads as
`medusa_lm_head.pt`, too. Opening reads headers only; a tensor is mapped or read when it is asked for, so memory holds
about one tensor at a time. Files are not trusted: PyTorch's are unpickled by its weights-only reader, and an index
names files of its own folder or is refused.
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

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.gguf import checkpoint as gguf
from eagle_jax.convert.hub import MEDUSA_FILE, Hub, first_line, resolve
from eagle_jax.convert.small_files import small_files

# Data types by their safetensors names. Others (float8, ...) are listed under their own name and never read.
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
    """A tensor in a file: what its header says, and `load`, which maps or reads it."""

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
    """An open folder.

    source: what the caller called it. files: the weight files that are read.
    made: {path: bytes} of config.json and the small files that a GGUF file has in its metadata; empty for a folder.
    faults: {tensor name: why it cannot be read}, such as a shard that is not there. Only a tensor that a model needs
    makes its fault an error.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    faults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    made: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def config_path(self) -> Path:
        """The file that holds the config."""
        return self.files[0] if self.made else self.folder / CONFIG

    @property
    def sized_by(self) -> str:
        """What messages call the config."""
        return "its metadata" if self.made else CONFIG

    def small_files(self) -> list[str]:
        """The paths of the small files, sorted; see `small_files.SMALL_FILES`."""
        return sorted(self.made.keys() - {CONFIG}) if self.made else small_files(self.folder)

    def read_small(self, path: str) -> bytes:
        """The bytes of config.json, or of one of the small files."""
        return self.made[path] if self.made else (self.folder / path).read_bytes()


def open_checkpoint(source: str | Path, hub: Hub | None = None) -> Checkpoint:
    """Opens a local folder or GGUF file, or downloads a Hugging Face repository and opens that.

    Args:
      hub: how a repository is fetched.

    Raises:
      CheckpointError: naming the file that is missing or damaged, and what to do about it.
      ConfigError: for a GGUF file of mathematics that is not implemented.
    """
    file = find_gguf(source)
    if file is not None:
        return _open_gguf(source, file)
    folder = resolve(source, hub)
    if not (folder / "config.json").is_file() and (folder / "target" / "config.json").is_file():
        raise CheckpointError(f"{source}: is a converted folder; load it with eagle_jax.load, or name it with --model")
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
    """The GGUF file that a name stands for: itself, or the one of a folder without other weights; None without one."""
    path = Path(source)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin", MEDUSA_FILE)):
        return None
    return gguf.gguf_file(path)


def folder_of(source: str | Path, hub: Hub | None = None, weights: bool = True) -> Path:
    """The folder of a model's config.json and small files; see `resolve`.

    A GGUF file has none: they are written to a temporary one, which is removed when the program ends.
    """
    file = find_gguf(source)
    if file is None:
        return resolve(source, hub, weights)
    return _written(file.resolve(), file.stat().st_mtime_ns)


@functools.cache
def _written(file: Path, changed: int) -> Path:
    """The temporary folder of a GGUF file as of its last change, in nanoseconds."""
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


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files to read, and {tensor name: file name} of their index (empty without one).

    `.safetensors` wins over `.bin`, and a file with the standard name over an index that does not list it
    (both as in transformers). An index of a format of which no file is left does not count. MEDUSA_FILE is read
    where there is neither format.
    """
    absent = None
    for single, shards in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin")):
        index = folder / f"{single}.index.json"
        weight_map = read_index(index) if index.is_file() else {}
        named = sorted(set(weight_map.values()))
        if (folder / single).is_file() and single not in named:
            return [folder / single], {}
        # Folders may hold other files beside shards of the standard name, such as consolidated.safetensors.
        present = sorted(folder.glob(single.replace(".", "*."))) or sorted(folder.glob(shards))
        missing = [name for name in named or _shards_of(present) if not (folder / name).is_file()]
        listed = [folder / name for name in named if name not in missing]
        if listed:  # with shards missing, perhaps, of which nobody needs a tensor
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
    """{tensor name: file name} of an index; every file name is one of the index's own folder."""
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
    """A JSON object from a file."""
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
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header, then the values.

    Read here and not by the safetensors package, which copies every tensor: these are views of the mapped file.
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
            if not math.prod(shape):  # nothing cannot be mapped
                return np.empty(shape, dtype)
            # A map of its own, so that its pages go when the tensor does.
            return np.require(np.memmap(path, dtype, "r", offset, shape), requirements="A")

        tensors[name] = Tensor(name, path, shape, dtype.name if dtype is not None else kind, load)
    if used != available:
        raise CheckpointError(f"{path}: holds {available} bytes of values, its header describes {used}; {damaged}")
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped where the format allows it (zip files, since PyTorch 1.6)."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading {path.suffix} files needs PyTorch: pip install eagle-jax[torch]"
        ) from error
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(
            f"{path}: PyTorch's weights-only reader refuses this file ({first_line(error)}); it is damaged, "
            "incomplete, or holds more than tensors. Download it again, or use a .safetensors file"
        ) from error
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
            # NumPy has no bfloat16 of its own: the bits pass as int16.
            if value.dtype == torch.bfloat16:
                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        tensors[name] = Tensor(name, path, tuple(value.shape), str(value.dtype).removeprefix("torch."), load)
    return tensors


def _shards_of(files: list[Path]) -> list[str]:
    """Names of all the shards of the series that these files are part of: x-00001-of-00002.bin, ..."""
    names = []
    for file in files:
        series = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)", file.name)
        if series:
            stem, _, count, suffix = series.groups()
            names += [f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
    return sorted(set(names))
