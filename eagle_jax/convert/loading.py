"""Loads models from a converted folder (`load`) or directly from official checkpoints (`from_pretrained`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from eagle_jax.convert import converted
from eagle_jax.convert.dialects import DIALECTS, OPTIONAL, build
from eagle_jax.convert.engine_plan import COPY, needed
from eagle_jax.convert.error import CheckpointError, NotConvertedError
from eagle_jax.convert.heads.choices import HeadChoices, HeadReading
from eagle_jax.convert.heads.reading import head_config
from eagle_jax.convert.hub import Hub, no_such_folder
from eagle_jax.convert.match import (
    PARAMETER_DTYPES,
    Match,
    as_draft,
    match_draft,
    match_pair,
    meet_target,
    output_path,
    own_dtype,
    parameter_dtype,
)
from eagle_jax.convert.previous import READING
from eagle_jax.convert.read import open_checkpoint, read_json
from eagle_jax.drafts.dflash import DFlash
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models import params
from eagle_jax.models.llama import Llama
from eagle_jax.ops.linear import InputFirst
from eagle_jax.sharding import mesh_of, path_layout, path_sharding

Models = tuple[Llama, Draft | None]


def load(path: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> Models:
    """Loads a folder that `convert` wrote.

    Args:
      dtype: of both models; None means the dtype they were converted to.
      mesh: reads every array into its sharding on this mesh (axes "data", "tensor"); None: one device.
    Returns:
      The target, and the draft (Eagle3Draft, Eagle1Draft, Medusa or DraftModel) or None.
    Raises:
      CheckpointError: if the folder is not a converted folder, is incomplete, or was changed since.
    """
    folder = Path(path)
    dtype = None if dtype is None else parameter_dtype(dtype)
    entries = _entries(folder)
    target = _load_model(folder / converted.TARGET, entries[converted.TARGET], dtype, mesh)
    if converted.DRAFT not in entries:
        return target, None
    draft = as_draft(_load_model(folder / converted.DRAFT, entries[converted.DRAFT], dtype, mesh))
    draft.check_fits(target)
    return target, draft


def from_pretrained(
    target: str | Path,
    draft: str | Path | None = None,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    head: HeadChoices | None = None,
) -> Models:
    """Loads official checkpoints without writing anything.

    Args:
      target: a Hugging Face folder or hub id, or a GGUF file of Llama's architecture.
      draft: another, or None. Its tensor names show its kind: an EAGLE head, Medusa heads, or a whole model, which is
        returned as a DraftModel.
      dtype: of both models; None means the target's own.
      mesh: as in `load`.
      revision, draft_revision: a branch, tag or commit of the target's and of the draft's hub repository.
      token: of the Hugging Face hub; None means that of `hf auth login` or HF_TOKEN.
      local_files_only: take hub repositories from the cache, without asking the network.
      head: settles what the config.json of an EAGLE head leaves open, such as the meaning of its ids of tapped layers.
    Raises:
      CheckpointError, ConfigError: as `convert`.
    """
    hub, draft_hub = (Hub(wanted, token, local_files_only) for wanted in (revision, draft_revision))
    target_match, draft_match = match_pair(target, draft, dtype, hub, draft_hub, head)
    return _fill(target_match, mesh), None if draft_match is None else as_draft(_fill(draft_match, mesh))


def load_draft(
    path: str | Path,
    target: Llama,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    head: HeadChoices | None = None,
) -> Draft:
    """Loads another draft for a loaded target.

    Args:
      path: a converted folder, whose draft is taken, or an official checkpoint (a folder or hub id).
      dtype: None means the target's own.
      mesh: as in `load`; None: the target's devices.
      revision, token, local_files_only: of a hub id; see `from_pretrained`.
      head: of an official checkpoint; see `from_pretrained`.
    Raises:
      CheckpointError, ConfigError: as `load` and `from_pretrained`.
    """
    dtype = parameter_dtype(target.dtype if dtype is None else dtype)
    own = mesh_of(target)
    mesh = own if mesh is None and isinstance(own, Mesh) else mesh
    if converted.is_conversion(Path(path)):
        entries = _entries(Path(path))
        if converted.DRAFT not in entries:
            raise CheckpointError(f"{path}: this converted folder holds no draft")
        draft = as_draft(_load_model(Path(path) / converted.DRAFT, entries[converted.DRAFT], dtype, mesh))
    else:
        checkpoint = open_checkpoint(path, Hub(revision, token, local_files_only))
        match = match_draft(checkpoint, dtype, head, target.config.num_layers)
        as_draft(match.model).check_fits(target)
        return as_draft(_fill(meet_target(match, lambda: _output_rows(target)), mesh))
    draft.check_fits(target)
    return draft


def load_head(
    source: str | Path,
    draft: str | Path | None = None,
    *,
    revision: str | None = None,
    draft_revision: str | None = None,
    head: HeadChoices | None = None,
    format: str | None = None,
) -> tuple[Llama, Draft | None]:
    """Loads a draft in its own dtype, and only the target's weights that `export` needs.

    Those are the embedding, and the lm_head if the draft lacks one or the format asks for a copy.

    Args:
      source: a converted folder, whose draft is taken; with `draft`, the target's official checkpoint.
      draft: the draft's official checkpoint.
      revision, draft_revision: of hub ids; see `from_pretrained`.
      head: of an official checkpoint; see `from_pretrained`.
      format: of the export, as in `export`.
    Raises:
      CheckpointError, ConfigError: as `load` and `from_pretrained`.
    """
    if draft is not None:
        target_match, draft_match = match_pair(source, draft, None, Hub(revision), Hub(draft_revision), head)
        assert draft_match is not None  # a draft was named
        loaded = as_draft(_fill(draft_match.of_dtype(_weights_dtype(draft_match)), None))
        needed = _needed_by_export(target_match.model, loaded, format)
        return _with_arrays(target_match.model, {path: target_match.read(path) for path in needed}), loaded
    folder = Path(source)
    entries = _entries(folder)
    target = _checked_model(folder / converted.TARGET, entries[converted.TARGET])
    if converted.DRAFT not in entries:
        return target, None
    loaded = as_draft(_load_model(folder / converted.DRAFT, entries[converted.DRAFT], None, None))
    loaded.check_fits(target)
    leaves = {path: params.flatten(target)[path] for path in _needed_by_export(target, loaded, format)}
    found: dict[str, jax.Array] = {}
    for _, arrays in _load_parts(folder / converted.TARGET, entries[converted.TARGET], leaves, None):
        found |= arrays
    return _with_arrays(target, found), loaded


def load_without_layers(
    source: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, revision: str | None = None
) -> Llama:
    """Loads a target's embedding, final norm and output matrix; see `Llama.without_layers`. Reads no other weight.

    Args:
      source: a converted folder, or an official checkpoint (a folder or hub id).
      dtype, mesh: as in `load`. revision: of a hub id.
    Raises:
      CheckpointError, ConfigError: as `load` and `from_pretrained`.
    """
    if not converted.is_conversion(Path(source)):
        match, _ = match_pair(source, None, dtype, Hub(revision))
        return _fill(dataclasses.replace(match, model=match.model.without_layers()), mesh)
    folder, entry = Path(source) / converted.TARGET, _entries(Path(source))[converted.TARGET]
    ends = _checked_model(folder, entry).without_layers()
    return _restored(ends, folder, entry, None if dtype is None else parameter_dtype(dtype), mesh)


_AGAIN = "convert again with --overwrite (python -m eagle_jax.convert)"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Holds a manifest's entry of one model.

    reading: how the config.json of an EAGLE head is read; None in folders of older versions.
    held: see `build`. arrays: {path: shape and dtype}; shapes: {path: shape}; checksums: {part: sha256}.
    """

    kind: str
    reading: HeadReading | None
    held: tuple[str, ...]
    dtype: str
    config_sha256: str
    arrays: dict[str, dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    checksums: dict[str, str]


def _entries(folder: Path) -> dict[str, _Entry]:
    """Returns the manifest's entries of a folder, by role."""
    path = folder / converted.MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, not a folder" if folder.exists() else no_such_folder(folder))
    if not path.is_file():
        raise NotConvertedError(
            f"{folder}: not a converted folder (it has no {converted.MANIFEST}); write one with "
            "python -m eagle_jax.convert, or load official checkpoints with from_pretrained"
        )
    manifest = read_json(path)
    if manifest.get("format") != converted.FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a converted folder")
    if manifest.get("version") != converted.VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.get('version')!r}, this version of eagle_jax reads {converted.VERSION}; "
            f"upgrade eagle_jax or {_AGAIN}"
        )
    roles = [converted.TARGET] if manifest.get(converted.DRAFT) is None else [converted.TARGET, converted.DRAFT]
    try:
        return {role: _entry(manifest[role], manifest["dtype"]) for role in roles}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: an entry is missing or malformed ({error}); {_AGAIN}") from error


def _entry(model: dict[str, Any], dtype: str) -> _Entry:
    arrays = {path: array for part in model["parts"].values() for path, array in part["arrays"].items()}
    # Folders of older versions do not say whether a head has an lm_head; their heads have one.
    told = {"embed": model["own_embedding"], "lm_head": model.get("own_lm_head", True)}
    told |= {path: path in arrays for path in OPTIONAL if path not in told}
    return _Entry(
        kind=model["kind"],
        reading=HeadReading.of_manifest(model.get(READING)),
        held=tuple(path for path, there in told.items() if there),
        dtype=dtype,
        config_sha256=model["config_sha256"],
        arrays=arrays,
        shapes={path: tuple(array["shape"]) for path, array in arrays.items()},
        checksums={name: part["sha256"] for name, part in model["parts"].items()},
    )


def _load_model(folder: Path, entry: _Entry, dtype: np.dtype | None, mesh: Mesh | None) -> Any:
    return _restored(_checked_model(folder, entry), folder, entry, dtype, mesh)


def _restored(model: Any, folder: Path, entry: _Entry, dtype: np.dtype | None, mesh: Mesh | None) -> Any:
    """Reads the arrays of an abstract model, which may lack some that the folder has."""
    arrays: dict[str, jax.Array] = {}
    for part, restored in _load_parts(folder, entry, params.flatten(model), mesh):
        arrays |= restored if dtype in (None, model.dtype) else _cast(restored, dtype, part)
    return _loaded(model, arrays)


def _checked_model(folder: Path, entry: _Entry) -> Any:
    """Returns the abstract model of config.json. The manifest must describe the same model."""
    config_path = folder / "config.json"
    if converted.file_sha256(config_path) != entry.config_sha256:
        raise CheckpointError(f"{config_path}: was changed after the conversion; {_AGAIN}")
    hf, stored_dtype = head_config(read_json(config_path), entry.reading), parameter_dtype(entry.dtype)
    model = build(entry.kind, hf, str(config_path), stored_dtype, held=entry.held, shapes=entry.shapes)
    expected = {path: converted.describe(leaf) for path, leaf in params.flatten(model).items()}
    if entry.arrays != expected:
        differing = sorted(path for path in entry.arrays | expected if entry.arrays.get(path) != expected.get(path))
        raise CheckpointError(f"{folder}: the manifest and config.json disagree on {', '.join(differing)}; {_AGAIN}")
    return model


def _load_parts(
    folder: Path, entry: _Entry, leaves: dict[str, Any], mesh: Mesh | None
) -> Iterator[tuple[Path, dict[str, jax.Array]]]:
    """Reads the parts of these leaves one after the other; yields (folder, arrays)."""
    for part, paths in converted.parts_of(leaves).items():
        part_folder = folder / converted.PARAMETERS / part
        if not part_folder.is_dir():
            raise CheckpointError(f"{part_folder}: this part is missing; {_AGAIN}")
        if converted.folder_sha256(part_folder) != entry.checksums.get(part):
            raise CheckpointError(f"{part_folder}: damaged or changed after the conversion; {_AGAIN}")
        yield (
            part_folder,
            converted.restore_part(part_folder, {path: _placed(path, leaves[path], mesh) for path in paths}),
        )


def _needed_by_export(target: Llama, draft: Draft, format: str | None) -> list[str]:
    """Returns the paths of the target's arrays that an export of the draft may compare or write."""
    borrows = isinstance(draft, Eagle3Draft) and not draft.config.own_lm_head
    borrows |= format is not None and COPY in needed(draft, format)
    borrows |= isinstance(draft, DFlash)  # its file may hold a copy
    return list(dict.fromkeys(["embed", *([output_path(target)] if borrows else [])]))


def _with_arrays(target: Llama, arrays: Mapping[str, Any]) -> Llama:
    """Returns an abstract target with some real arrays."""
    return params.load(target, params.flatten(target) | dict(arrays))


def _output_rows(target: Llama) -> np.ndarray:
    """Returns a loaded target's output matrix [V, D]; undoes the transposed storage of InputFirst."""
    weight = target.embed if target.lm_head is None else target.lm_head
    rows = np.asarray(weight[...])
    return rows.T if isinstance(weight, InputFirst) else rows


def _weights_dtype(match: Match) -> np.dtype:
    """Returns the dtype of a checkpoint's weights if they share one of PARAMETER_DTYPES, else the config's."""
    found = {tensor.dtype for path, tensor in match.tensors.items() if path != DIALECTS[match.kind].of_target}
    one = found.pop() if len(found) == 1 else None
    return parameter_dtype(one) if one in PARAMETER_DTYPES else own_dtype(match.checkpoint)


def _fill(match: Match, mesh: Mesh | None) -> Any:
    arrays = {}
    for path, leaf in params.flatten(match.model).items():
        values = match.read(path)
        if mesh is None:
            # Copies: JAX would alias the mapped file where its memory is aligned.
            arrays[path] = jax.device_put(values.copy())
        else:
            arrays[path] = _shard(values, path_sharding(path, leaf.shape, mesh))
    return _loaded(match.model, arrays)


def _loaded(model: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """Replaces the arrays of an abstract model; one that lies in another order than `path_layout` is copied."""

    def stored(path: str, array: jax.Array) -> jax.Array:
        wanted, found = path_layout(path, array.shape), array.format.layout  # type: ignore[attr-defined]
        if wanted is None or found is None or wanted.major_to_minor == found.major_to_minor:
            return array
        return jax.device_put(array, Format(wanted, array.sharding))

    return params.load(model, {path: stored(path, array) for path, array in arrays.items()})


def _shard(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Copies each device's shard from a mapped file; a process reads only its shards."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index].copy())


def _placed(path: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else path_sharding(path, leaf.shape, mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _cast(arrays: dict[str, jax.Array], dtype: np.dtype, where: Path) -> dict[str, jax.Array]:
    """Casts the floating-point arrays of a part to another dtype and keeps their shardings."""
    cast, finite = _cast_all(list(arrays.values()), dtype)
    too_large = [path for path, fits in zip(arrays, finite, strict=True) if not fits]
    if too_large:
        raise CheckpointError(f"{where}: {too_large[0]} is too large for {dtype.name}; choose bfloat16 or float32")
    return {path: jax.device_put(new, old.sharding) for (path, old), new in zip(arrays.items(), cast, strict=True)}


@functools.partial(jax.jit, static_argnames="dtype")
def _cast_all(arrays: list[jax.Array], dtype: np.dtype) -> tuple[list[jax.Array], list[jax.Array]]:
    """Takes a list, so that layers of equal shapes share one compiled program."""
    cast = [array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array for array in arrays]
    return cast, [jnp.isfinite(array).all() for array in cast]
