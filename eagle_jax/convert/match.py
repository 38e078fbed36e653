"""Matching a checkpoint to the model that its config describes: every tensor has a place, every place a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import Checkpoint, Tensor, open_checkpoint
from eagle_jax.convert.vocabulary import target_ids_of
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models import params
from eagle_jax.models.config import DraftConfig, LlamaConfig
from eagle_jax.models.eagle1 import Eagle1Draft
from eagle_jax.models.eagle3 import Eagle3Draft
from eagle_jax.models.llama import Llama

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*PARAMETER_DTYPES, "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")

BLOCK = 1 << 22  # values checked or cast at a time: bounds the temporaries
OFFICIAL_TAPS = 3  # target layers that an EAGLE-3 head reads, unless its config names them


@dataclasses.dataclass(frozen=True)
class Match:
    """A model and where its parameters come from.

    kind: "llama", "eagle3", "eagle1" or "medusa". model: abstract (shapes and dtypes in place of arrays).
    tensors: the source of each parameter by path; all but `target_ids`, which is read already.
    """

    kind: str
    model: Any
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    target_ids: np.ndarray | None

    def read(self, path: str) -> np.ndarray:
        """The parameter at `path`: checked, in the model's shape and dtype; a view of the file where no cast is due."""
        if path == "target_ids":
            assert self.target_ids is not None  # the model has this path only with ids
            return self.target_ids
        leaf = params.flatten(self.model)[path]
        return finite_values(self.tensors[path], leaf.dtype).reshape(leaf.shape)


def match_pair(target: str | Path, draft: str | Path | None, dtype: Any) -> tuple[Match, Match | None]:
    """Opens and matches both checkpoints, and checks that the draft was made for the target. Reads no weights.

    Args:
      dtype: of both models; None means the target's own.
    Raises:
      CheckpointError: a damaged or contradictory checkpoint.
      ConfigError: a config that is not implemented, or a draft that does not fit its target.
    """
    checkpoint = open_checkpoint(target)
    dtype = own_dtype(checkpoint) if dtype is None else parameter_dtype(dtype)
    target_match = match_target(checkpoint, dtype)
    if draft is None:
        return target_match, None
    draft_match = match_draft(open_checkpoint(draft), dtype)
    as_draft(draft_match.model).check_fits(target_match.model)
    return target_match, draft_match


def match_target(checkpoint: Checkpoint, dtype: np.dtype) -> Match:
    """Matches a Llama checkpoint."""
    model = build("llama", checkpoint.config, str(checkpoint.config_path), dtype)
    return _match("llama", names.LLAMA, model, checkpoint)


def match_draft(checkpoint: Checkpoint, dtype: np.dtype) -> Match:
    """Matches the checkpoint of a draft; its kind is read from its tensor names."""
    kind, table = names.draft_kind(checkpoint.tensors, str(checkpoint.folder))
    if kind == "medusa":
        return _match_medusa(table, checkpoint, dtype)
    own_embedding = table["embed"] in checkpoint.tensors
    model = build(kind, checkpoint.config, str(checkpoint.config_path), dtype, own_embedding=own_embedding)
    return _match(kind, table, model, checkpoint)


def as_draft(model: Any) -> Draft:
    """A model in the draft's role: a whole Llama is wrapped, any other draft is one as it is."""
    return DraftModel(model) if isinstance(model, Llama) else model


def build(
    kind: str,
    hf: Mapping[str, Any],
    where: str,
    dtype: Any,
    *,
    own_embedding: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """The abstract model of a kind and a Hugging Face config.

    Args:
      where: what the sizes come from, for messages.
      own_embedding: of EAGLE heads, whose config does not tell.
      shapes: {path: shape} of all parameters; of Medusa heads, whose config holds no sizes.
    Raises:
      CheckpointError: an unknown kind, or shapes that no model has.
      ConfigError: a config that is not implemented.
    """
    if kind == "medusa":
        medusa = medusa_config(shapes or {}, where)
        return params.abstract(lambda key: Medusa(medusa, key, dtype))
    if kind == "llama":
        config = LlamaConfig.from_hf(hf, where)
        return params.abstract(lambda key: Llama(config, key, dtype))
    if kind not in ("eagle1", "eagle3"):
        raise CheckpointError(f"{where}: unknown kind of model {kind!r}")
    head = DraftConfig.from_hf(hf, where, own_embedding)
    if kind == "eagle1":
        return params.abstract(lambda key: Eagle1Draft(head, key, dtype))
    num_taps = OFFICIAL_TAPS if head.taps is None else len(head.taps)
    return params.abstract(lambda key: Eagle3Draft(head, num_taps, key, dtype))


def medusa_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> MedusaConfig:
    """The config of Medusa heads from {path: shape}. Paths and shapes that contradict it are for the caller to find."""
    sizes = shapes.get("heads.0.lm_head", ())
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{where}: a Medusa head's lm_head has shape [V, H], here it is {list(sizes)}")
    heads = {path.split(".")[1] for path in shapes if path.startswith("heads.")}
    blocks = {path.split(".")[3] for path in shapes if path.startswith("heads.0.blocks.")}
    return MedusaConfig(*sizes, num_heads=len(heads), num_blocks=len(blocks))


def parameter_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of a name or a type.

    Raises:
      CheckpointError: if models are not kept in this dtype.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in PARAMETER_DTYPES:
        raise CheckpointError(f"dtype {name} is not one of {', '.join(PARAMETER_DTYPES)}")
    return jnp.dtype(name)


def own_dtype(checkpoint: Checkpoint) -> np.dtype:
    """What a checkpoint's config names as its dtype, else that of its floating-point tensors."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATS}
    if named is None or named == "auto":
        if len(found) != 1:
            raise CheckpointError(f"{checkpoint.folder}: holds dtypes {sorted(found)}; choose one with dtype")
        named = found.pop()
    return parameter_dtype(str(named).removeprefix("torch."))


def finite_values(tensor: Tensor, dtype: Any) -> np.ndarray:
    """The values of a floating-point tensor in `dtype`.

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


def _match_medusa(table: Mapping[str, str], checkpoint: Checkpoint, dtype: np.dtype) -> Match:
    """Matches Medusa heads, whose config holds no sizes: their tensors' names and shapes tell them."""
    _require(table.values(), checkpoint, "the file is incomplete")
    tensors = {path: checkpoint.tensors[name] for path, name in table.items()}
    shapes = {path: tensor.shape for path, tensor in tensors.items()}
    model = build("medusa", checkpoint.config, tensors["heads.0.lm_head"].where, dtype, shapes=shapes)
    # Of the config only this: published ones say medusa_num_heads 2 where the file holds 5.
    told, num_blocks = checkpoint.config.get("medusa_num_layers"), model.config.num_blocks
    if told not in (None, num_blocks):
        raise CheckpointError(
            f"{checkpoint.config_path}: medusa_num_layers is {told!r}, by its tensors' names a head has {num_blocks} "
            "residual blocks; config.json or the weights belong to another model"
        )
    return _match("medusa", table, model, checkpoint, sized_by="the rest of the file")


def _match(
    kind: str, table: Mapping[str, str], model: Any, checkpoint: Checkpoint, sized_by: str = "config.json"
) -> Match:
    leaves = params.flatten(model)
    tensors = checkpoint.tensors
    weights = {path: names.official_name(table, path) for path in leaves if path != "target_ids"}
    tables = {names.DRAFT_TO_TARGET, names.TARGET_TO_DRAFT} & set(tensors) if kind == "eagle3" else set()

    _require(weights.values(), checkpoint, "the files are incomplete, or config.json belongs to another model")
    for path, name in weights.items():
        _check(tensors[name], names.official_shape(path, leaves[path].shape), FLOATS, sized_by)
    for name in sorted(set(tensors) - set(weights.values()) - tables):
        if not names.IGNORED.fullmatch(name) and not _repeats_embedding(name, model, weights, tensors):
            raise CheckpointError(
                f"{tensors[name].where} has no place in the model that {sized_by} describes; "
                "one of the two belongs to another model"
            )
    sources = {path: tensors[name] for path, name in weights.items()}
    ids = _target_ids(model.config, tensors, str(checkpoint.folder)) if kind == "eagle3" else None
    return Match(kind, model, checkpoint, sources, ids)


def _require(wanted: Collection[str], checkpoint: Checkpoint, cause: str) -> None:
    missing = sorted(set(wanted) - set(checkpoint.tensors))
    if missing:
        files = ", ".join(file.name for file in checkpoint.files)
        raise CheckpointError(f"{checkpoint.folder}: tensor {_and_more(missing)} missing from {files}; {cause}")


def _check(tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[str, ...], sized_by: str = "config.json") -> None:
    if tensor.shape != shape:
        raise CheckpointError(f"{tensor.where} has shape {tensor.shape}, {sized_by} asks for {shape}")
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{tensor.where} is of dtype {tensor.dtype}; expected one of {', '.join(dtypes)}")


def _repeats_embedding(name: str, model: Any, weights: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether `name` is an lm_head that repeats a tied embedding.

    Raises:
      CheckpointError: if it differs from the embedding.
    """
    if name != "lm_head.weight" or "embed" not in weights or not model.config.tie_word_embeddings:
        return False
    head, embedding = tensors[name], tensors[weights["embed"]]
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        ours, theirs = head.load().reshape(-1), embedding.load().reshape(-1)
        blocks = range(0, ours.size, BLOCK)
        if all(np.array_equal(ours[i : i + BLOCK], theirs[i : i + BLOCK]) for i in blocks):
            return True
    raise CheckpointError(
        f"{head.where} differs from the embedding {embedding.name!r} although config.json sets tie_word_embeddings; "
        "one of the two files is wrong"
    )


def _target_ids(config: DraftConfig, tensors: Mapping[str, Tensor], where: str) -> np.ndarray | None:
    d2t, t2d = tensors.get(names.DRAFT_TO_TARGET), tensors.get(names.TARGET_TO_DRAFT)
    if d2t is not None:
        _check(d2t, (config.draft_vocab_size,), INTEGERS)
    if t2d is not None:
        _check(t2d, (config.vocab_size,), ("bool",))
    return target_ids_of(
        None if d2t is None else d2t.load(),
        None if t2d is None else t2d.load(),
        config.draft_vocab_size,
        config.vocab_size,
        where,
    )


def _and_more(missing: list[str]) -> str:
    rest = len(missing) - 1
    return f"{missing[0]!r} is" if not rest else f"{missing[0]!r} (and {rest} more) are"
