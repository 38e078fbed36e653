"""Matches a checkpoint to the model of its config: every tensor has a parameter, every parameter a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.convert import experts, names
from eagle_jax.convert.dialects import DIALECTS, OPTIONAL, build, draft_kind
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.choices import HeadChoices, HeadReading
from eagle_jax.convert.heads.reading import head_config, read_head
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.multimodal import text_part
from eagle_jax.convert.read import Checkpoint, Tensor, open_checkpoint
from eagle_jax.convert.vocabulary import target_ids_of
from eagle_jax.drafts.dflash import DFlashConfig
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models import params
from eagle_jax.models.llama import Llama

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*PARAMETER_DTYPES, "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")

LM_HEAD = names.LLAMA["lm_head"]
# {parameter's path: field of a head's config.json that asks for it}, where the tensor has another name than the field.
ASKED_BY = {"input_norm": "norm_before_fc", "layer.attention.o_bias": "attention_bias"}

BLOCK = 1 << 22  # values per check or cast; bounds the temporaries


@dataclasses.dataclass(frozen=True)
class Match:
    """Holds an abstract model and the sources of its parameters.

    kind: a key of DIALECTS. model: has shapes and dtypes in place of arrays.
    tensors: the source of each parameter by path, except `target_ids`, which is already read, and the path that
      `meet_target` adds.
    copy: a copy of the target's lm_head in the file of an EAGLE-1 head; see `meet_target`.
    reading: how the config.json of an EAGLE head was read.
    """

    kind: str
    model: Any
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    target_ids: np.ndarray | None
    copy: Tensor | None = None
    reading: HeadReading | None = None

    def read(self, path: str) -> np.ndarray:
        """Reads a parameter, checked, in the model's shape and dtype; a view of the file where no cast is needed."""
        if path == "target_ids":
            assert self.target_ids is not None  # the model has this path only with ids
            return self.target_ids
        leaf = params.flatten(self.model)[path]
        return finite_values(self.tensors[path], leaf.dtype).reshape(leaf.shape)

    def of_dtype(self, dtype: np.dtype) -> Match:
        """Returns this match with another dtype of the parameters."""
        leaves = {
            path: leaf if path == "target_ids" else jax.ShapeDtypeStruct(leaf.shape, dtype)
            for path, leaf in params.flatten(self.model).items()
        }
        return dataclasses.replace(self, model=params.load(self.model, leaves))


def match_pair(
    target: str | Path,
    draft: str | Path | None,
    dtype: Any,
    hub: Hub | None = None,
    draft_hub: Hub | None = None,
    choices: HeadChoices | None = None,
) -> tuple[Match, Match | None]:
    """Opens and matches both checkpoints, and checks that the draft fits the target.

    Reads no weights, except duplicates that have to be equal.

    Args:
      dtype: of both models; None means the target's own.
      hub, draft_hub: download options of the target's and the draft's repositories.
      choices: what the config.json of an EAGLE head leaves open.
    Raises:
      CheckpointError: a damaged or contradictory checkpoint.
      ConfigError: a config that is not implemented, or a draft that does not fit its target.
    """
    checkpoint = text_part(open_checkpoint(target, hub))
    dtype = own_dtype(checkpoint) if dtype is None else parameter_dtype(dtype)
    target_match = match_target(checkpoint, dtype)
    if draft is None:
        return target_match, None
    num_layers = target_match.model.config.num_layers
    draft_match = match_draft(open_checkpoint(draft, draft_hub), dtype, choices, num_layers)
    as_draft(draft_match.model).check_fits(target_match.model)
    return target_match, meet_target(draft_match, lambda: target_match.read(output_path(target_match.model)))


def match_target(checkpoint: Checkpoint, dtype: np.dtype) -> Match:
    """Matches the checkpoint of a language model."""
    model = build("llama", checkpoint.config, str(checkpoint.config_path), dtype)
    table = names.llama_table(checkpoint.tensors.keys() | checkpoint.faults.keys()) or names.LLAMA
    return _match("llama", table, model, checkpoint, checkpoint.sized_by)


def match_draft(
    checkpoint: Checkpoint, dtype: np.dtype, choices: HeadChoices | None = None, num_layers: int | None = None
) -> Match:
    """Matches the checkpoint of a draft; its tensor names show its kind.

    Args:
      choices, num_layers: see `read_head`.
    """
    where = str(checkpoint.folder)
    checkpoint, reading = read_head(text_part(checkpoint), choices, num_layers)
    official = checkpoint.tensors.keys() | checkpoint.faults.keys()
    hf = head_config(checkpoint.config, reading)
    kind, table = draft_kind(official, where)
    dialect = DIALECTS[kind]
    held = [path for path in OPTIONAL if table.get(path) in official]
    tied = dialect.tied_to_own and hf.get("tie_word_embeddings")
    if tied and "lm_head" not in held and "embed" in held:
        held.append("lm_head")
        table = table | {"lm_head": table["embed"]}
    sized_by, sizes_in, shapes = checkpoint.sized_by, str(checkpoint.config_path), {}
    if dialect.sized_by is not None:
        _require(table.values(), checkpoint, "the file is incomplete")
        shapes = {path: checkpoint.tensors[name].shape for path, name in table.items()}
        sized_by, sizes_in = "the rest of the file", checkpoint.tensors[table[dialect.sized_by]].where
    model = build(kind, hf, sizes_in, dtype, held=held, shapes=shapes)
    dialect.check(model, checkpoint)
    return dataclasses.replace(_match(kind, table, model, checkpoint, sized_by), reading=reading)


def meet_target(match: Match, target_rows: Callable[[], np.ndarray]) -> Match:
    """Gives a draft what it takes of its target's weights: an EAGLE-1 head of frequent tokens, its output rows.

    Also checks the copy of the target's lm_head that some engines require in the file of an EAGLE-1 head.

    Args:
      target_rows: reads the target's output matrix, [V, D].
    Returns:
      The match, with a source for every parameter.
    Raises:
      CheckpointError: if the copy differs; drafting always uses the target's.
    """
    path, ids = DIALECTS[match.kind].of_target, match.target_ids
    if path in params.flatten(match.model):
        leaf = params.flatten(match.model)[path]
        rows = Tensor(path, match.checkpoint.folder, leaf.shape, leaf.dtype.name, lambda: target_rows()[ids])
        match = dataclasses.replace(match, tensors={**match.tensors, path: rows})
    if match.copy is None:
        return match
    dtype = match.model.dtype
    ours, theirs = finite_values(match.copy, dtype), target_rows()
    if ids is not None and len(ours) == len(ids):
        theirs = theirs[ids]
    if ours.shape != theirs.shape or not _same_values(ours, theirs.astype(dtype, copy=False)):
        raise CheckpointError(
            f"{match.copy.where} differs from the target's lm_head, which EAGLE-1 heads draft with; the head was made "
            "for another target, or remove this tensor"
        )
    return match


def output_path(target: Llama) -> str:
    """Returns the path of a target's output matrix: its lm_head, or the tied embedding."""
    return "embed" if target.config.tie_word_embeddings else "lm_head"


def as_draft(model: Any) -> Draft:
    """Wraps a whole Llama as a DraftModel; returns any other draft as it is."""
    return DraftModel(model) if isinstance(model, Llama) else model


def parameter_dtype(dtype: Any) -> np.dtype:
    """Returns the NumPy dtype of a name or a type.

    Raises:
      CheckpointError: if it is not one of PARAMETER_DTYPES.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in PARAMETER_DTYPES:
        raise CheckpointError(f"dtype {name} is not one of {', '.join(PARAMETER_DTYPES)}")
    return jnp.dtype(name)


def own_dtype(checkpoint: Checkpoint) -> np.dtype:
    """Returns the dtype that a checkpoint's config names, else the one of its floating-point tensors."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    read = {name: tensor for name, tensor in checkpoint.tensors.items() if not names.IGNORED.fullmatch(name)}
    found = {tensor.dtype for tensor in read.values() if tensor.dtype in FLOATS}
    if named is None or named == "auto":
        if len(found) != 1:
            raise CheckpointError(f"{checkpoint.folder}: holds dtypes {sorted(found)}; choose one with dtype")
        named = found.pop()
    return parameter_dtype(str(named).removeprefix("torch."))


def finite_values(tensor: Tensor, dtype: Any) -> np.ndarray:
    """Reads a floating-point tensor in `dtype`.

    Raises:
      CheckpointError: NaN or infinity in the file, or a value that is too large for `dtype`.
    """
    try:
        source = tensor.load()
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{tensor.where} cannot be read ({error}); download the file again") from error
    flat = source.reshape(-1)
    out = flat if flat.dtype == dtype else np.empty(flat.shape, dtype)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        if not np.isfinite(block).all():
            raise CheckpointError(f"{tensor.where} holds NaN or infinity; the file is damaged, download it again")
        if out is flat:
            continue
        with np.errstate(over="ignore"):  # reported below, by name
            out[start : start + BLOCK] = block.astype(dtype)
        if not np.isfinite(out[start : start + BLOCK]).all():
            largest = float(np.abs(block.astype(np.float64)).max())
            raise CheckpointError(
                f"{tensor.where} holds {largest:g}, too large for {np.dtype(dtype).name}; choose bfloat16 or float32"
            )
    return out.reshape(source.shape)


def _match(kind: str, table: dict[str, str], model: Any, checkpoint: Checkpoint, sized_by: str) -> Match:
    dialect = DIALECTS[kind]
    table = dialect.table(table, model)
    leaves = params.flatten(model)
    elsewhere = ("target_ids", dialect.of_target)
    weights = {path: names.official_name(table, path) for path in leaves if path not in elsewhere}
    count = dialect.experts(model)
    if count is not None:
        checkpoint = experts.unpack(checkpoint, weights.values(), count)
    tensors = checkpoint.tensors
    tied = dialect.ties_lm_head and model.config.tie_word_embeddings
    lm_head = table.get("lm_head", LM_HEAD)
    if tied and weights["embed"] not in tensors and lm_head in tensors:
        weights["embed"] = lm_head  # a file may keep either name of a tied tensor
    unread = dialect.unread(model, checkpoint)

    cause = f"the files are incomplete, or {sized_by} belongs to another model"
    for path, field in ASKED_BY.items():
        if path in weights and weights[path] not in tensors:
            cause += f" (its {field} asks for {weights[path]!r})"
    _require(weights.values(), checkpoint, cause)
    for path, name in weights.items():
        _check(tensors[name], names.official_shape(path, leaves[path].shape), FLOATS, sized_by)
    for name in sorted(tensors.keys() - set(weights.values()) - unread):
        if tied and name == lm_head:
            _check_repeats(tensors[name], tensors[weights["embed"]])
        elif not names.IGNORED.fullmatch(name):
            raise CheckpointError(
                f"{tensors[name].where} has no place in the model that {sized_by} describes; "
                "one of the two belongs to another model"
            )
    sources = {path: tensors[name] for path, name in weights.items()}
    ids = _target_ids(model.config, checkpoint) if dialect.vocabulary else None
    return Match(kind, model, checkpoint, sources, ids, tensors.get(LM_HEAD) if dialect.of_target else None)


def _require(wanted: Collection[str], checkpoint: Checkpoint, cause: str) -> None:
    faults = sorted(set(wanted) & checkpoint.faults.keys())
    if faults:
        raise CheckpointError(checkpoint.faults[faults[0]])
    missing = sorted(set(wanted) - checkpoint.tensors.keys())
    if missing:
        files = ", ".join(file.name for file in checkpoint.files)
        raise CheckpointError(f"{checkpoint.folder}: tensor {_and_more(missing)} missing from {files}; {cause}")


def _check(tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[str, ...], sized_by: str = "config.json") -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor.where} has shape {tensor.shape}, {sized_by} asks for {shape}")
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{tensor.where} is of dtype {tensor.dtype}; expected one of {', '.join(dtypes)}")


def _check_repeats(lm_head: Tensor, embedding: Tensor) -> None:
    """Raises CheckpointError if an lm_head differs from the embedding that it is tied to."""
    alike = (lm_head.shape, lm_head.dtype) == (embedding.shape, embedding.dtype)
    if not alike or not _same_values(lm_head.load(), embedding.load()):
        raise CheckpointError(
            f"{lm_head.where} differs from the embedding {embedding.name!r} although config.json sets "
            "tie_word_embeddings; one of the two files is wrong"
        )


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Compares two arrays of one shape, in blocks that bound the temporaries."""
    a, b = a.reshape(-1), b.reshape(-1)
    return all(np.array_equal(a[i : i + BLOCK], b[i : i + BLOCK]) for i in range(0, a.size, BLOCK))


def _target_ids(config: DraftConfig | DFlashConfig, checkpoint: Checkpoint) -> np.ndarray | None:
    if config.draft_vocab_size in (0, config.vocab_size):
        return None
    if names.DRAFT_TO_TARGET in checkpoint.faults:
        raise CheckpointError(checkpoint.faults[names.DRAFT_TO_TARGET])
    d2t, t2d = (checkpoint.tensors.get(name) for name in (names.DRAFT_TO_TARGET, names.TARGET_TO_DRAFT))
    if d2t is not None:
        _check(d2t, (config.draft_vocab_size,), INTEGERS)
    if t2d is not None:
        _check(t2d, (config.vocab_size,), ("bool",))
    return target_ids_of(
        None if d2t is None else d2t.load(),
        None if t2d is None else t2d.load(),
        config.draft_vocab_size,
        config.vocab_size,
        str(checkpoint.folder),
    )


def _and_more(missing: list[str]) -> str:
    rest = len(missing) - 1
    return f"{missing[0]!r} is" if not rest else f"{missing[0]!r} (and {rest} more) are"
