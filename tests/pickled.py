"""Reads the golden weights with NumPy where PyTorch is not installed.

Only for the files of this repository, whose pickles are trusted; the package's reader is eagle_jax/convert/read.py.
"""

from __future__ import annotations

import importlib.util
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "LongStorage": np.int64, "BoolStorage": np.bool_}
_folders = tempfile.TemporaryDirectory(prefix="golden-")


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile):
        (self.name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(self.name))
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if name in DTYPES:
            return np.dtype(DTYPES[name])
        return {"_rebuild_tensor_v2": _rebuild, "OrderedDict": dict}[name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, *_ = pid
        return np.frombuffer(self.archive.read(self.name.replace("data.pkl", f"data/{key}")), dtype)


def _rebuild(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a `pytorch_model.bin`."""
    with zipfile.ZipFile(path) as archive:
        return _Reader(archive).load()


def readable(folder: Path) -> Path:
    """Returns the folder; without PyTorch, a copy whose weights are safetensors."""
    if importlib.util.find_spec("torch") is not None or (folder / "model.safetensors").exists():
        return folder
    copy = Path(_folders.name) / folder.name
    if not copy.exists():
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(read(folder / "pytorch_model.bin"), copy / "model.safetensors", {"format": "pt"})
    return copy
