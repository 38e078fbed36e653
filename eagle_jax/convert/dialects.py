"""Recognises, sizes and names the checkpoints of each kind of model, by one table. A new head adds an entry."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import Checkpoint
from eagle_jax.drafts.dflash import DFlash, DFlashConfig
from eagle_jax.drafts.dspark import DSpark, DSparkConfig
from eagle_jax.drafts.eagle.config import OFFICIAL_TAPS, DraftConfig
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.flat_config import is_vllm_eagle1
from eagle_jax.drafts.eagle.p_eagle import PEagle, PEagleConfig
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.models import params
from eagle_jax.models.architectures import ARCHITECTURES, config_of
from eagle_jax.models.llama import Llama

# Paths of EAGLE heads whose presence shows in the tensor names only.
OPTIONAL = ("embed", "lm_head", "fc_bias", "target_ids")
VOCABULARY = {names.DRAFT_TO_TARGET, names.TARGET_TO_DRAFT}


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds the sizes of a model.

    hf: its config.json. where: its name, for messages. held: the paths of OPTIONAL in its files. shapes: {path: shape}.
    """

    hf: Mapping[str, Any]
    where: str
    held: Collection[str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Describes one kind of model to the conversion.

    recognise: returns the name table that a checkpoint uses; None if its tensor names are of another kind.
    build: returns the abstract model of a dtype. official: returns the name table that a model is written with.
    sized_by: the path of the tensor that sizes a kind whose config has no sizes; None: config.json.
    check: raises CheckpointError where a checkpoint's config contradicts the model.
    table: returns the name table of a checkpoint, from the one that `recognise` returned and the model.
    experts: returns how many experts a layer of the model has; see `experts.unpack`. None without experts.
    unread: returns the tensors that are no parameter's source.
    ties_lm_head: whether config.json may tie the lm_head to the embedding; a file then holds either or both.
    tied_to_own: whether config.json may tie a missing lm_head to the head's embedding.
    vocabulary: whether there may be a draft vocabulary, in tables beside the weights. trivial_tables: whether official
      files have these tables of the target's vocabulary, too.
    of_target: the path that is filled with the target's output rows of the draft vocabulary, "" for none. A file may
      hold a copy of them, or of the target's lm_head.
    """

    recognise: Callable[[Collection[str]], dict[str, str] | None]
    build: Callable[[Source, Any], Any]
    official: Callable[[Any], dict[str, str]]
    sized_by: str | None = None
    check: Callable[[Any, Checkpoint], None] = lambda model, checkpoint: None
    table: Callable[[dict[str, str], Any], dict[str, str]] = lambda recognised, model: recognised
    experts: Callable[[Any], int | None] = lambda model: None
    unread: Callable[[Any, Checkpoint], set[str]] = lambda model, checkpoint: set()
    ties_lm_head: bool = False
    tied_to_own: bool = False
    vocabulary: bool = False
    trivial_tables: bool = False
    of_target: str = ""


def draft_kind(tensor_names: Collection[str], where: str) -> tuple[str, dict[str, str]]:
    """Returns the kind of a draft, a key of DIALECTS, and its table, from its official tensor names.

    Args:
      where: the checkpoint's name, for messages.
    Raises:
      CheckpointError: if these are not the names of a draft.
    """
    for kind, dialect in DIALECTS.items():
        table = dialect.recognise(tensor_names)
        if table is not None:
            return kind, table
    raise CheckpointError(
        f"{where}: not a draft: it has neither midlayer.* nor layers.0.* with fc.weight (an EAGLE head), nor "
        f"fc.weight with hidden_norm.weight (a DFlash head), "
        f"nor {names.MEDUSA_PREFIX}* or 0.0.* (Medusa heads), nor model.layers.* (a language model); "
        f"its tensors are {', '.join(sorted(tensor_names)[:5]) or 'none'}, ..."
    )


def build(
    kind: str,
    hf: Mapping[str, Any],
    where: str,
    dtype: Any,
    *,
    held: Collection[str] = OPTIONAL,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """Builds the abstract model of a kind and a Hugging Face config.

    Args:
      where: the source of the sizes, for messages.
      held: the paths of OPTIONAL that the files of an EAGLE head hold; its config does not say.
      shapes: {path: shape} of all parameters of Medusa heads, whose config has no sizes.
    Raises:
      CheckpointError: an unknown kind, or impossible shapes.
      ConfigError: a config that is not implemented.
    """
    if kind not in list(DIALECTS):  # a damaged manifest may hold an unhashable value
        raise CheckpointError(f"{where}: unknown kind of model {kind!r}")
    return DIALECTS[kind].build(Source(hf, where, held, shapes or {}), dtype)


def _llama(source: Source, dtype: Any) -> Any:
    config = config_of(source.hf, source.where)
    return params.abstract(lambda key: ARCHITECTURES[config.model_type].model(config, key, dtype))


def _llama_names(model: Llama) -> dict[str, str]:
    architecture = ARCHITECTURES[model.config.model_type]
    return names.decoder_table(names.LAYER | architecture.names) | architecture.outer_names


def _num_experts(model: Llama) -> int | None:
    return None if model.config.experts is None else model.config.experts.count


def _eagle1(source: Source, dtype: Any) -> Any:
    fc_bias = not is_vllm_eagle1(source.hf) or "fc_bias" in source.held
    own = {"own_embedding": "embed" in source.held, "own_lm_head": True, "fc_bias": fc_bias}
    config = DraftConfig.from_hf(source.hf, source.where, kind="eagle1", **own)
    if "target_ids" not in source.held:
        config = dataclasses.replace(config, draft_vocab_size=config.vocab_size)
    return params.abstract(lambda key: Eagle1Draft(config, key, dtype))


def _eagle3(
    source: Source, dtype: Any, of_config: type[DraftConfig] = DraftConfig, of_draft: type[Eagle3Draft] = Eagle3Draft
) -> Any:
    own: dict[str, Any] = {"own_embedding": "embed" in source.held, "own_lm_head": "lm_head" in source.held}
    own["fc_bias"] = "fc_bias" in source.held
    config: Any = of_config.from_hf(source.hf, source.where, **own)
    num_taps = OFFICIAL_TAPS if config.taps is None else len(config.taps)
    return params.abstract(lambda key: of_draft(config, num_taps, key, dtype))


def _dflash(
    source: Source, dtype: Any, of_config: type[DFlashConfig] = DFlashConfig, of_draft: type[DFlash] = DFlash
) -> Any:
    # Older converted folders say that a DFlash head has an lm_head, although it has none; their shapes are right.
    own_lm_head = "lm_head" in (source.shapes or source.held)
    config: Any = of_config.from_hf(
        source.hf, source.where, own_embedding="embed" in source.held, own_lm_head=own_lm_head
    )
    return params.abstract(lambda key: of_draft(config, key, dtype))


def _medusa(source: Source, dtype: Any) -> Any:
    config = medusa_config(source.shapes, source.where)
    return params.abstract(lambda key: Medusa(config, key, dtype))


def medusa_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> MedusaConfig:
    """Derives the config of Medusa heads from {path: shape}. The caller compares the other paths and shapes with it."""
    sizes = shapes.get("heads.0.lm_head", ())
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{where}: a Medusa head's lm_head has shape [V, H], here it is {list(sizes)}")
    heads = {path.split(".")[1] for path in shapes if path.startswith("heads.")}
    blocks = {path.split(".")[3] for path in shapes if path.startswith("heads.0.blocks.")}
    return MedusaConfig(*sizes, num_heads=len(heads), num_blocks=len(blocks))


def _check_medusa(model: Medusa, checkpoint: Checkpoint) -> None:
    """Compares medusa_num_layers only: published configs say medusa_num_heads 2 for files with 5 heads."""
    told, num_blocks = checkpoint.config.get("medusa_num_layers"), model.config.num_blocks
    if told not in (None, num_blocks):
        raise CheckpointError(
            f"{checkpoint.config_path}: medusa_num_layers is {told!r}, by its tensors' names a head has {num_blocks} "
            "residual blocks; config.json or the weights belong to another model"
        )


def _unread_eagle1(model: Eagle1Draft, checkpoint: Checkpoint) -> set[str]:
    """Returns the copy of the target's lm_head, vocabulary tables, and tensors that only vLLM wants."""
    unread = {names.LLAMA["lm_head"]} | VOCABULARY
    if is_vllm_eagle1(checkpoint.config):
        unread |= {name for name in checkpoint.tensors if names.VLLM_UNREAD.fullmatch(name)}
    return unread


# Keyed by the kind's name in manifests. A checkpoint has the first kind that recognises its names.
DIALECTS: dict[str, Dialect] = {
    "peagle": Dialect(
        recognise=names.peagle_table,
        build=functools.partial(_eagle3, of_config=PEagleConfig, of_draft=PEagle),
        official=lambda model: names.PEAGLE,
        unread=lambda model, checkpoint: VOCABULARY,
        tied_to_own=True,
        vocabulary=True,
        trivial_tables=True,
    ),
    "eagle3": Dialect(
        recognise=names.eagle3_table,
        build=_eagle3,
        official=lambda model: names.EAGLE3,
        unread=lambda model, checkpoint: VOCABULARY,
        tied_to_own=True,
        vocabulary=True,
        trivial_tables=True,
    ),
    "eagle1": Dialect(
        recognise=names.eagle1_table,
        build=_eagle1,
        official=lambda model: names.EAGLE1,
        unread=_unread_eagle1,
        vocabulary=True,
        of_target="lm_head",
    ),
    "dspark": Dialect(
        recognise=names.dspark_table,
        build=functools.partial(_dflash, of_config=DSparkConfig, of_draft=DSpark),
        official=lambda model: names.DSPARK,
        unread=lambda model, checkpoint: VOCABULARY,
        vocabulary=True,
    ),
    "dflash": Dialect(
        recognise=names.dflash_table,
        build=_dflash,
        official=lambda model: names.DFLASH,
        unread=lambda model, checkpoint: VOCABULARY,
        vocabulary=True,
    ),
    "medusa": Dialect(
        recognise=names.medusa_table,
        build=_medusa,
        official=lambda model: names.medusa_names(model.config.num_heads, model.config.num_blocks),
        sized_by="heads.0.lm_head",
        check=_check_medusa,
    ),
    "llama": Dialect(
        recognise=names.llama_table,
        build=_llama,
        official=_llama_names,
        table=lambda recognised, model: recognised if recognised is names.GGUF else _llama_names(model),
        experts=_num_experts,
        ties_lm_head=True,
    ),
}
