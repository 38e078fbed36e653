"""Exports an EAGLE, DFlash or DSpark head to a folder for another engine or trainer; reads it back and compares."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.dialects import DIALECTS
from eagle_jax.convert.engine_plan import plan
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.match import finite_values, match_draft, parameter_dtype
from eagle_jax.convert.plans import Plan
from eagle_jax.convert.previous import some
from eagle_jax.convert.read import Tensor, open_checkpoint
from eagle_jax.drafts.protocol import Draft
from eagle_jax.files.atomic import added_to, new_folder, settle, write_json
from eagle_jax.models import params
from eagle_jax.models.llama import Llama

SAFETENSORS, CONFIG = "model.safetensors", "config.json"
WRITTEN = (SAFETENSORS, "pytorch_model.bin", CONFIG)  # the files of an export, of any format
WEIGHTS = re.compile(r"\.(safetensors|bin|pt)(\.index\.json)?$")


@dataclasses.dataclass(frozen=True)
class Exported:
    """Describes an export. shapes: {tensor name: (shape, dtype)}; num_bytes: of all files; config: config.json."""

    format: str
    folder: Path
    files: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], str]]
    num_bytes: int
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def export(
    draft: Draft,
    target: Llama,
    out: str | Path,
    *,
    format: str,
    dtype: Any = None,
    overwrite: bool = False,
    safetensors: bool = False,
) -> Exported:
    """Writes a head for another engine, reads the folder back, and compares every tensor bit for bit.

    Args:
      draft: an Eagle3Draft, Eagle1Draft, DFlash or DSpark.
      target: the model it drafts for. Its embedding and lm_head are written where the head lacks them and the format
        needs them; no other weight is. It may be abstract where no array of it is needed; see `plan`.
      out: the folder to write: the weights and config.json.
      format: a key of `engines.ENGINES`, of `block_engines.BLOCK_ENGINES` for a head that drafts blocks, such as
        "official", "sglang" or "vllm"; see docs/export.md.
      dtype: "float32", "bfloat16" or "float16", to cast; None keeps the head's own. The vocabulary tables d2t [Vd]
        int64 and t2d [V] bool stay as they are.
      overwrite: write into a folder that is not empty. Only the files of a previous export are replaced.
      safetensors: write model.safetensors, whatever the format's own file is.
    Raises:
      ConfigError: a head that the engine cannot run as it is; nothing is written.
      CheckpointError: an `out` that is taken, weights that are not finite or too large for `dtype`, or a folder that
        reads back differently. Nothing is left behind.
    """
    out = Path(out).resolve()
    check_place(out, overwrite)
    planned = plan(draft, target, format)
    cast = parameter_dtype(draft.dtype if dtype is None else dtype)  # type: ignore[attr-defined]
    tensors = {name: _cast(name, array, cast) for name, array in planned.tensors.items()}
    own = {path: leaf for path, leaf in params.flatten(draft).items() if path not in planned.dropped}
    leaves = {path: _cast(path, np.asarray(leaf), cast) for path, leaf in own.items()}
    leaves |= {path: _cast(path, array, cast) for path, array in planned.added.items()}
    config = planned.config | {"torch_dtype": cast.name}

    file, notes = SAFETENSORS if safetensors else planned.file, planned.notes
    if file != SAFETENSORS and importlib.util.find_spec("torch") is None:
        notes += (
            f"{SAFETENSORS} in place of {file}, which needs PyTorch; the engine reads it where there is no {file}",
        )
        file = SAFETENSORS
    kept = sorted(entry.name for entry in out.iterdir() if entry.name not in WRITTEN) if out.exists() else []
    if kept:
        notes += (f"kept in {out}: {some(kept)}",)
    previous = any((out / name).exists() for name in WRITTEN)
    with added_to(out) if kept and not previous else new_folder(out, keep=_is_users) as folder:
        write_json(folder / CONFIG, config)
        write_tensors(folder / file, tensors)
        verify(folder, planned, config, tensors, leaves, target.config.num_layers)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    shapes = {name: (array.shape, array.dtype.name) for name, array in tensors.items()}
    return Exported(format, out, (file, CONFIG), shapes, num_bytes, config, notes)


def _is_users(path: Path) -> bool:
    """Returns whether no export writes a file of this path below the folder."""
    return path.as_posix() not in WRITTEN


def check_place(out: Path, overwrite: bool) -> None:
    """Checks that an export may write to a folder.

    Raises:
      CheckpointError: for a file, for a folder that is not empty, or, with `overwrite`, for one with weights that no
        export wrote, which an engine would read too.
    """
    settle(out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another output folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out}: is not empty; choose another output folder, or write into it with --overwrite (overwrite=True)"
        )
    weights = [file.name for file in sorted(out.iterdir()) if file.name not in WRITTEN and WEIGHTS.search(file.name)]
    if weights:
        raise CheckpointError(
            f"{out}: holds other weights ({some(weights)}), which an engine would read; choose another output folder"
        )


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors or a PyTorch file."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        path.touch()
        mode = path.stat().st_mode  # the user's default mode: safetensors writes files that only the owner may read
        save_file(dict(tensors), path, metadata={"format": "pt"})
        path.chmod(mode)
        return
    import torch

    def as_torch(array: np.ndarray) -> torch.Tensor:
        # Copies, since JAX's arrays are read-only. PyTorch does not take NumPy's bfloat16: pass its bits as int16.
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    torch.save({name: as_torch(array) for name, array in tensors.items()}, path)


def verify(
    folder: Path,
    planned: Plan,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    leaves: Mapping[str, np.ndarray],
    num_layers: int,
) -> None:
    """Reads a written folder like any checkpoint, and compares it bit for bit with the export.

    Args:
      config, tensors: the written values. leaves: the head's parameters by path. num_layers: of the target.
    Raises:
      CheckpointError: naming the differences.
    """
    checkpoint = open_checkpoint(folder)
    match = match_draft(checkpoint, leaves["fc"].dtype, num_layers=num_layers)
    differing = [f"{CONFIG}: {name}" for name in config if checkpoint.config.get(name) != config[name]]
    read, expected = (dataclasses.asdict(one) for one in (match.model.config, planned.expected))
    differing += [f"{CONFIG}: {name}" for name in expected if read[name] != expected[name]]
    if match.kind != planned.kind:
        differing.append(f"the kind of head ({match.kind})")
    for name in sorted(tensors.keys() | checkpoint.tensors.keys()):
        found = checkpoint.tensors.get(name)
        if found is None or name not in tensors or not _same_bits(found.load(), tensors[name]):
            differing.append(f"tensor {name}")
    paths = params.flatten(match.model)
    # Rows of the target's lm_head are in no file.
    differing += [
        f"parameter {path}"
        for path in sorted((paths.keys() | leaves.keys()) - {DIALECTS[match.kind].of_target})
        if path not in paths or path not in leaves or not _same_bits(match.read(path), leaves[path])
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: what was written reads back differently: {', '.join(differing[:5])}; the disk or a library "
            "that writes these files is at fault, nothing was kept"
        )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    ours, theirs = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(ours, theirs)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Casts weights to `dtype`, checked; returns a vocabulary table as it is."""
    if name in (*names.TABLES, "target_ids"):
        return array
    return finite_values(Tensor(name, Path("the head"), array.shape, array.dtype.name, lambda: array), dtype)
