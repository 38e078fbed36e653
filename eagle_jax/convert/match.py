"""Matching a checkpoint to the model that its config describes: every tensor has a place, every place a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.read import Checkpoint, Tensor, open_checkpoint
from eagle_jax.convert.vocabulary import target_ids_of
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle.config import OFFICIAL_TAPS, DraftConfig
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.flat_config import is_vllm_eagle1
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models import params
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*PARAMETER_DTYPES, "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")

LM_HEAD = names.LLAMA["lm_head"]
OPTIONAL = ("embed", "lm_head", "fc_bias")  # paths of EAGLE heads that tensor names tell of, not the config

BLOCK = 1 << 22  # values checked or cast at a time: bounds the temporaries


@dataclasses.dataclass(frozen=True)
class Match:
    """A model and where its parameters come from.

    kind: "llama", "eagle3", "eagle1" or "medusa". model: abstract (shapes and dtypes in place of arrays).
    tensors: the source of each parameter by path; all but `target_ids`, which is read already.
    copy: the target's lm_head in the file of an EAGLE-1 head, which drafts with the target's; see `check_copy`.
    """

    kind: str
    model: Any
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    target_ids: np.ndarray | None
    copy: Tensor | None = None

    def read(self, path: str) -> np.ndarray:
        """The parameter at `path`: checked, in the model's shape and dtype; a view of the file where no cast is due."""
        if path == "target_ids":
            assert self.target_ids is not None  # the model has this path only with ids
            return self.target_ids
        leaf = params.flatten(self.model)[path]
        return finite_values(self.tensors[path], leaf.dtype).reshape(leaf.shape)


def match_pair(
    target: str | Path, draft: str | Path | None, dtype: Any, hub: Hub | None = None, draft_hub: Hub | None = None
) -> tuple[Match, Match | None]:
    """Opens and matches both checkpoints, and checks that the draft was made for the target.

    Reads no weights, except those that are in the files twice and have to be equal.

    Args:
      dtype: of both models; None means the target's own.
      hub, draft_hub: how the target's and the draft's repositories are fetched.
    Raises:
      CheckpointError: a damaged or contradictory checkpoint.
      ConfigError: a config that is not implemented, or a draft that does not fit its target.
    """
    checkpoint = open_checkpoint(target, hub)
    dtype = own_dtype(checkpoint) if dtype is None else parameter_dtype(dtype)
    target_match = match_target(checkpoint, dtype)
    if draft is None:
        return target_match, None
    draft_match = match_draft(open_checkpoint(draft, draft_hub), dtype)
    as_draft(draft_match.model).check_fits(target_match.model)
    check_copy(draft_match, lambda: target_match.read(output_path(target_match.model)))
    return target_match, draft_match


def match_target(checkpoint: Checkpoint, dtype: np.dtype) -> Match:
    """Matches a Llama checkpoint."""
    model = build("llama", checkpoint.config, str(checkpoint.config_path), dtype)
    return _match("llama", names.LLAMA, model, checkpoint)


def match_draft(checkpoint: Checkpoint, dtype: np.dtype) -> Match:
    """Matches the checkpoint of a draft; its kind is read from its tensor names."""
    where = str(checkpoint.folder)
    official = names.head_names(checkpoint.tensors.keys() | checkpoint.faults.keys(), where)
    checkpoint = dataclasses.replace(
        checkpoint,
        tensors={bare: checkpoint.tensors[name] for bare, name in official.items() if name in checkpoint.tensors},
        faults={bare: checkpoint.faults[name] for bare, name in official.items() if name in checkpoint.faults},
    )
    kind, table = names.draft_kind(official, where)
    if kind == "medusa":
        return _match_medusa(table, checkpoint, dtype)
    held = [path for path in OPTIONAL if table.get(path) in official]
    if kind == "eagle3" and "lm_head" not in held and "embed" in held and checkpoint.config.get("tie_word_embeddings"):
        held.append("lm_head")  # tied to the head's own embedding
        table = table | {"lm_head": table["embed"]}
    model = build(kind, checkpoint.config, str(checkpoint.config_path), dtype, held=held)
    return _match(kind, table, model, checkpoint)


def check_copy(match: Match, target_rows: Callable[[], np.ndarray]) -> None:
    """Checks the copy of the target's lm_head that some engines want in the file of an EAGLE-1 head.

    Args:
      target_rows: reads the target's output matrix, [V, D].
    Raises:
      CheckpointError: if the two differ; drafting always uses the target's.
    """
    if match.copy is None:
        return
    dtype = match.model.dtype
    ours, theirs = finite_values(match.copy, dtype), target_rows()
    if ours.shape != theirs.shape or not _same_values(ours, theirs.astype(dtype, copy=False)):
        raise CheckpointError(
            f"{match.copy.where} differs from the target's lm_head, which EAGLE-1 heads draft with; the head was made "
            "for another target, or remove this tensor"
        )


def output_path(target: Llama) -> str:
    """The path of a target's output matrix: its lm_head, or the embedding where they are tied."""
    return "embed" if target.config.tie_word_embeddings else "lm_head"


def as_draft(model: Any) -> Draft:
    """A model in the draft's role: a whole Llama is wrapped, any other draft is one as it is."""
    return DraftModel(model) if isinstance(model, Llama) else model


def build(
    kind: str,
    hf: Mapping[str, Any],
    where: str,
    dtype: Any,
    *,
    held: Collection[str] = OPTIONAL,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """The abstract model of a kind and a Hugging Face config.

    Args:
      where: what the sizes come from, for messages.
      held: which of the paths OPTIONAL the files of an EAGLE head hold; its config does not tell.
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
    own_lm_head, fc_bias = kind == "eagle1" or "lm_head" in held, not is_vllm_eagle1(hf) or "fc_bias" in held
    head = DraftConfig.from_hf(
        hf, where, own_embedding="embed" in held, kind=kind, own_lm_head=own_lm_head, fc_bias=fc_bias
    )
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
    """What a checkpoint's config names as its dtype, else that of its floating-point tensors with a meaning."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    read = {name: tensor for name, tensor in checkpoint.tensors.items() if not names.IGNORED.fullmatch(name)}
    found = {tensor.dtype for tensor in read.values() if tensor.dtype in FLOATS}
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
    tied = kind == "llama" and model.config.tie_word_embeddings
    if tied and weights["embed"] not in tensors and LM_HEAD in tensors:
        weights["embed"] = LM_HEAD  # of two names for one tensor a file may keep either
    unread = _unread(kind, model, checkpoint)

    _require(weights.values(), checkpoint, "the files are incomplete, or config.json belongs to another model")
    for path, name in weights.items():
        _check(tensors[name], names.official_shape(path, leaves[path].shape), FLOATS, sized_by)
    for name in sorted(tensors.keys() - set(weights.values()) - unread):
        if tied and name == LM_HEAD:
            _check_repeats(tensors[name], tensors[weights["embed"]])
        elif not names.IGNORED.fullmatch(name):
            raise CheckpointError(
                f"{tensors[name].where} has no place in the model that {sized_by} describes; "
                "one of the two belongs to another model"
            )
    sources = {path: tensors[name] for path, name in weights.items()}
    ids = _target_ids(model.config, checkpoint) if kind == "eagle3" else None
    return Match(kind, model, checkpoint, sources, ids, tensors.get(LM_HEAD) if kind == "eagle1" else None)


def _unread(kind: str, model: Any, checkpoint: Checkpoint) -> set[str]:
    """Tensors that no parameter of an EAGLE head comes from: vocabulary tables, and what other engines want there."""
    if kind not in ("eagle1", "eagle3"):
        return set()
    tables = {names.DRAFT_TO_TARGET, names.TARGET_TO_DRAFT}
    if kind == "eagle3":
        return tables
    one_vocabulary = model.config.draft_vocab_size == model.config.vocab_size
    unread = {LM_HEAD} | (tables if one_vocabulary else set())
    if is_vllm_eagle1(checkpoint.config):
        unread |= {name for name in checkpoint.tensors if names.VLLM_UNREAD.fullmatch(name)}
    return unread


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
    """Whether two arrays of one shape are equal, in blocks that bound the temporaries."""
    a, b = a.reshape(-1), b.reshape(-1)
    return all(np.array_equal(a[i : i + BLOCK], b[i : i + BLOCK]) for i in range(0, a.size, BLOCK))


def _target_ids(config: DraftConfig, checkpoint: Checkpoint) -> np.ndarray | None:
    if config.draft_vocab_size == config.vocab_size:
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
