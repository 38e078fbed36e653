"""Builds data, target, model and objective of a run from its settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eagle_jax import convert
from eagle_jax.convert import converted
from eagle_jax.convert.hub import Hub, named_revision
from eagle_jax.convert.loading import load_without_layers
from eagle_jax.convert.read import folder_of, read_json
from eagle_jax.convert.tokenizing import tokenizer_of
from eagle_jax.drafts.dflash import DFlash, DFlashConfig, spaced_taps
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.p_eagle import PEagle, PEagleConfig
from eagle_jax.drafts.protocol import Draft
from eagle_jax.drafts.registry import CLASSES
from eagle_jax.files import checksums
from eagle_jax.models import params
from eagle_jax.models.architectures import ARCHITECTURES, config_of
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.models.rope import RopeConfig
from eagle_jax.train import fingerprint
from eagle_jax.train.config import LIMIT, DataSettings, HeadSettings, LossSettings, TrainSettings
from eagle_jax.train.data import dataset, features, loader
from eagle_jax.train.data.dataset import Dataset
from eagle_jax.train.data.features import Rows
from eagle_jax.train.data.records import ReadReport, read_records
from eagle_jax.train.data.rendering import read_template
from eagle_jax.train.loss.dflash import DFlashObjective
from eagle_jax.train.loss.objective import Eagle1Objective, Eagle3Objective, Objective, TargetObjective
from eagle_jax.train.loss.p_eagle import PEagleObjective
from eagle_jax.train.loss.vocabulary import CHUNK
from eagle_jax.train.report import Say
from eagle_jax.train.run import processes, resume

Splits = dict[str, tuple[Dataset, Rows]]


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The folder of the target, its tokenizer and config; of kind target: of the model that is trained.

    predicted: the positions of a document that the run's loss predicts, see `predicted_by`.
    """

    folder: Path
    tokenizer: Any
    config: LlamaConfig
    predicted: slice


def source(settings: TrainSettings) -> DataSource:
    """Opens the folder that settings.target or settings.model names.

    Raises:
      ValueError: for a model to train that has experts: `ops.experts` has no gradient.
    """
    if settings.kind == "target":
        assert settings.model is not None
        path = Path(settings.model)
        config = config_of(read_json(path), str(path))
        if config.experts is not None:
            raise ValueError(f"{path}: a target with experts cannot be trained here, only heads for one (kind eagle3)")
        return DataSource(path.parent, tokenizer_of(path.parent), config, predicted_by(settings))
    assert settings.target is not None
    folder = Path(settings.target)
    if converted.is_conversion(folder):
        folder = folder / converted.TARGET
    else:
        target, revision = named_revision(settings.target)
        folder = folder_of(target, Hub(revision))
    config = config_of(read_json(folder / "config.json"), str(folder / "config.json"))
    return DataSource(folder, tokenizer_of(folder), config, predicted_by(settings))


def predicted_by(settings: TrainSettings) -> slice:
    """Returns the positions of a document whose loss mask counts in the loss.

    A target predicts all tokens except the first. EAGLE-3 and P-EAGLE read a feature and the token after it, and
    predict the next token; EAGLE-3's official alignment applies the mask of the input position instead. EAGLE-1
    regresses the feature after each position. DFlash predicts after an anchor, and reads a feature before it.
    """
    return training_of(settings).predicted(settings.loss)


def documents(
    files: Sequence[str], settings: DataSettings, origin: DataSource, folder: Path, say: Say, begun: bool = False
) -> Dataset:
    """Tokenises files into `folder`, or reuses it if files, settings and tokenizer have the same checksums.

    Args:
      begun: whether a run has already trained on the folder's documents; they must not change then.
    Raises:
      ValueError: if the files of such a run changed, or hold nothing to learn.
      DataError: see `read_records`.
    """
    template = read_template(settings.chat_template)
    about = {
        "files": [checksums.of_file(name) for name in files],
        "row_length": settings.row_length,
        "on_error": settings.on_error,
        "too_long": settings.too_long,
        "add_end": settings.add_end,
        "chat_template": template,
        "tokenizer": None if origin.tokenizer is None else fingerprint.of_tokenizer(origin.tokenizer),
    }
    old = dataset.about(folder)
    if old == about:
        return dataset.read(folder)
    if begun and old is not None:
        changed = ", ".join(name for name in about if old.get(name) != about[name])
        raise ValueError(f"{folder}: the data changed since this run began ({changed}); choose another output")
    report = ReadReport()
    records = read_records(
        files,
        origin.tokenizer,
        vocab_size=origin.config.vocab_size,
        max_length=settings.row_length,
        on_error=settings.on_error,
        too_long=settings.too_long,
        add_end=settings.add_end,
        chat_template=template,
        predicted=origin.predicted,
        report=report,
    )
    try:
        made = dataset.write(folder, records, about)
    except dataset.NothingToLearn as error:
        say(report.summary())
        counts = ", ".join(f"{count:,} {kind}" for kind, count in report.faults.most_common())
        why = counts or ("no loss sees a token to learn" if report.lines else "the files are empty")
        read = report.counted(report.lines)
        raise ValueError(f"{error} in {', '.join(files)}: of {read} none is used ({why})") from error
    say(report.summary())
    return made


def splits(settings: TrainSettings, origin: DataSource, say: Say) -> Splits:
    """Returns the tokenised and packed documents of "train" and, where the settings name files, of "held_out".

    Raises:
      ValueError, DataError: see `documents`.
    """
    output, found = Path(settings.output), {}
    begun = resume.begun(output)
    for split, files in (("train", settings.data.train), ("held_out", settings.data.held_out)):
        if files:
            prepare = functools.partial(documents, files, settings.data, origin, output / "data" / split, say, begun)
            data = processes.first_then_others(prepare)
            found[split] = data, rows_of(data, settings)
    return found


def runs_target(settings: TrainSettings) -> bool:
    """Returns whether a head's run needs its target's layers: for hidden states, for decoding, or for their checksum.

    Features of earlier versions have a checksum of the whole target alone.
    """
    decodes = bool(settings.data.held_out) and settings.evaluation.prompts > 0
    return decodes or settings.features is None or not features.know_ends(Path(settings.features))


def load_target(settings: TrainSettings, mesh: Mesh, layers: bool = True) -> Llama:
    """Loads a head's target, sharded over the mesh, in the dtype of the computation.

    Args:
      layers: False reads the weights outside of the decoder layers alone; see `Llama.without_layers`.
    """
    assert settings.target is not None
    is_conversion = converted.is_conversion(Path(settings.target))
    source, revision = (settings.target, None) if is_conversion else named_revision(settings.target)
    if not layers:
        return load_without_layers(source, dtype=settings.dtype, mesh=mesh, revision=revision)
    if is_conversion:
        return convert.load(source, dtype=settings.dtype, mesh=mesh)[0]
    return convert.from_pretrained(source, dtype=settings.dtype, mesh=mesh, revision=revision)[0]


def new_model(settings: TrainSettings, origin: DataSource, target: Llama | None, train: Dataset, say: Say) -> Any:
    """Returns the model to train, in float32: settings.start, or one with random weights."""
    key = jax.random.key(settings.seed)
    if settings.kind == "target" and settings.start is not None:
        start, revision = named_revision(settings.start)
        model = convert.from_pretrained(start, dtype="float32", revision=revision)[0]
        if model.config != origin.config:
            raise ValueError(f"start: {settings.start} has another config than {settings.model}")
        return model
    if settings.kind == "target":
        return ARCHITECTURES[origin.config.model_type].model(origin.config, key, jnp.float32)
    assert target is not None
    if settings.start is not None:
        start, revision = named_revision(settings.start)
        head = convert.load_draft(start, target, dtype="float32", revision=revision)
        if type(head) is not CLASSES[settings.kind]:  # a subclass is a kind of its own, with another loss
            raise ValueError(f"start: {settings.start} is a {type(head).__name__}, kind is {settings.kind}")
        if isinstance(head, Eagle1Draft) and head.target_ids is not None:
            raise ValueError(
                f"start: {settings.start} drafts frequent tokens only, which training does not know; start from the "
                "head without their table, and name the table when you convert the new one (--token-map)"
            )
        if isinstance(head, DFlash) and (head.lm_head is not None or head.config.from_root):
            raise ValueError(
                f"start: {settings.start} has an lm_head of its own, or drafts a token at the root "
                "(sample_from_anchor), which training does not know"
            )
        return head
    new_head = training_of(settings).new_head
    assert new_head is not None  # it is no target
    return new_head(head_config(settings, origin.config), key, target, train, say)


def new_eagle3(
    draft: type[Eagle3Draft], config: DraftConfig, key: jax.Array, target: Llama, train: Dataset, say: Say
) -> Eagle3Draft:
    """Initialises an EAGLE-3 or P-EAGLE head with the target's final norm and its output rows of the draft vocabulary.

    Only the layers before them start from random weights, and P-EAGLE's `mask_hidden` from N(0, 1), as published.
    """
    taps = 3 if config.taps is None else len(config.taps)
    head = draft(config, taps, key)
    output, made = target.output_weight(), params.flatten(head)
    if head.target_ids is not None:
        ids, coverage = frequent_tokens(train, config.vocab_size, config.draft_vocab_size)
        say(f"draft vocabulary: {len(ids)} of {config.vocab_size} tokens, {coverage:.2%} of the tokens to learn")
        output, made["target_ids"] = output[ids], jnp.asarray(ids)
    if isinstance(head, PEagle):
        made["mask_hidden"] = jax.random.normal(jax.random.fold_in(key, 1), head.mask_hidden.shape)
    made |= {"norm": _last_norm(target), "lm_head": output.astype(jnp.float32)}
    return params.load(head, made)


def new_dflash(config: DFlashConfig, key: jax.Array, target: Llama, train: Dataset, say: Say) -> DFlash:
    """Initialises a head with the target's final norm, since its outputs go to the target's output matrix."""
    head = DFlash(config, key)
    return params.load(head, params.flatten(head) | {"norm": _last_norm(target)})


def _last_norm(target: Llama) -> jax.Array:
    """Returns the target's final norm as a factor, in float32."""
    return target.norm[...].astype(jnp.float32) + (1 if target.config.norm_plus_one else 0)


def head_config(settings: TrainSettings, target: LlamaConfig) -> LlamaConfig:
    """Returns the config of a head: layers of Llama in the target's shape, with the changes in settings.head.

    Raises:
      ValueError: naming the setting that does not fit.
    """
    head = settings.head
    fields: dict[str, Any] = dict(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        num_layers=1,
        intermediate_size=head.intermediate_size or target.intermediate_size,
        num_heads=head.num_heads or target.num_heads,
        num_kv_heads=head.num_kv_heads or target.num_kv_heads,
        head_dim=head.head_dim or target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=RopeConfig(head.rope_theta),
        max_position_embeddings=target.max_position_embeddings,
    )
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise ValueError(
            f"head.num_heads {fields['num_heads']} is no multiple of head.num_kv_heads {fields['num_kv_heads']} (the "
            "target's own where the settings have none)"
        )
    if (head.draft_vocab_size or 0) > target.vocab_size:
        raise ValueError(f"head.draft_vocab_size {head.draft_vocab_size} is more than the target's {target.vocab_size}")
    of_kind = training_of(settings).head_config
    assert of_kind is not None  # it is no target
    return of_kind(fields, head, target)


def eagle1_config(layer: dict[str, Any], head: HeadSettings, target: LlamaConfig) -> DraftConfig:
    """Adds to the fields of its layer what an EAGLE-1 head has."""
    return DraftConfig(**layer, target_hidden_size=target.hidden_size, fc_bias=True)


def eagle3_config(layer: dict[str, Any], head: HeadSettings, target: LlamaConfig) -> DraftConfig:
    """Adds to the fields of its layers what an EAGLE-3 head has."""
    vocabulary = head.draft_vocab_size or target.vocab_size
    own = {"target_hidden_size": target.hidden_size, "draft_vocab_size": vocabulary, "taps": head.taps}
    return DraftConfig(**layer | own | head.parts)


def p_eagle_config(layer: dict[str, Any], head: HeadSettings, target: LlamaConfig) -> PEagleConfig:
    """Adds to the fields of an EAGLE-3 head what a P-EAGLE head has.

    Raises:
      ValueError: for a mask token that the target does not have.
    """
    own = {"mask_token_id": mask_token(head, target), "num_depths": head.num_depths}
    return PEagleConfig(**vars(eagle3_config(layer, head, target)) | own)


def mask_token(head: HeadSettings, target: LlamaConfig) -> int:
    """Returns the token that stands for unknown ones.

    Raises:
      ValueError: if the target does not have it.
    """
    mask = head.mask_token_id
    if mask is None or mask >= target.vocab_size:
        raise ValueError(f"head.mask_token_id {mask} is no token of the target's: it has {target.vocab_size}")
    return mask


def dflash_config(layer: dict[str, Any], head: HeadSettings, target: LlamaConfig) -> DFlashConfig:
    """Adds to the fields of its layers, which are Qwen3's, what a DFlash head has.

    Raises:
      ValueError: naming the setting that does not fit the target.
    """
    mask, layers = mask_token(head, target), target.num_layers
    taps = head.taps or spaced_taps(layers, head.num_layers)
    if min(taps) < 1 or max(taps) > layers:
        raise ValueError(
            f"head.taps {list(taps)}: a DFlash head reads the inputs of layers 1 to {layers}, the last output"
        )
    own = {"model_type": "qwen3", "qk_norm": True, "num_layers": head.num_layers, "windows": head.windows}
    block = {"block_size": head.block_size, "mask_token_id": mask, "causal": head.causal}
    return DFlashConfig(**layer | own | block, taps=taps, num_target_layers=layers)


def frequent_tokens(train: Dataset, vocab_size: int, count: int) -> tuple[np.ndarray, float]:
    """Returns the ids of the most frequent tokens to learn, ascending, ties by id; and the share that they cover."""
    seen = np.zeros(vocab_size, np.int64)
    for start in range(0, len(train.tokens), 1 << 24):
        part = slice(start, start + (1 << 24))
        seen += np.bincount(train.tokens[part][train.mask[part] > 0], minlength=vocab_size)
    ids = np.sort(np.argsort(-seen, kind="stable")[:count]).astype(np.int32)
    return ids, float(seen[ids].sum() / max(seen.sum(), 1))


def rows_of(data: Dataset, settings: TrainSettings) -> Rows:
    """Packs documents into sequences: {sequence length: documents of each sequence}."""
    length = settings.data.row_length
    if settings.data.packing:
        return {length: dataset.pack(data.lengths, length, settings.seed)}
    return dataset.in_buckets(data.lengths, settings.data.buckets or (length,))


def rows_of_a_batch(rows: Rows, settings: TrainSettings) -> dict[int, int]:
    """Returns the batch size by sequence length."""
    return {length: settings.rows(length) for length in rows}


def total_steps(settings: TrainSettings, rows: Rows) -> int:
    """Returns the number of steps of a run.

    Raises:
      ValueError: for epochs of more steps than int32 counts.
    """
    total = settings.steps or loader.steps_of(rows, rows_of_a_batch(rows, settings), settings.epochs or 1)
    if total >= LIMIT:
        raise ValueError(f"epochs: {settings.epochs} are {total:,} steps, more than can be counted")
    return total


def objective_of(settings: TrainSettings) -> Objective:
    """Builds the objective; its chunk grows with the devices that shard the batch."""
    chunk = CHUNK * settings.mesh.data * settings.mesh.fsdp
    return training_of(settings).objective(settings.loss, jnp.dtype(settings.dtype), chunk)


@dataclasses.dataclass(frozen=True)
class Training:
    """The functions that train one kind of model.

    predicted: returns the positions that the loss predicts, see `predicted_by`.
    objective: builds the loss from the settings, the dtype of the computation and the chunk size.
    new_head: initialises a head of a config; None for a target.
    head_config: returns its config from the fields of a Llama layer, the settings and the target's config; None for a
      target.
    """

    predicted: Callable[[LossSettings], slice]
    objective: Callable[[LossSettings, Any, int], Objective]
    new_head: Callable[[Any, jax.Array, Llama, Dataset, Say], Draft] | None = None
    head_config: Callable[[dict[str, Any], HeadSettings, LlamaConfig], LlamaConfig] | None = None


# Keyed by settings.kind: "target", and every kind of draft with weights. None: no training.
TRAINED: dict[str, Training | None] = {
    "target": Training(
        predicted=lambda loss: slice(1, None),
        objective=lambda loss, dtype, chunk: TargetObjective(dtype, chunk),
    ),
    "eagle1": Training(
        predicted=lambda loss: slice(None, -1),
        objective=lambda loss, dtype, chunk: Eagle1Objective(
            loss.token_weight, loss.noise, dtype, chunk, loss.objective
        ),
        new_head=lambda config, key, target, train, say: Eagle1Draft(config, key),
        head_config=eagle1_config,
    ),
    "eagle3": Training(
        predicted=lambda loss: slice(None) if loss.alignment == "official" else slice(2, None),
        objective=lambda loss, dtype, chunk: Eagle3Objective(
            loss.weights, loss.alignment, loss.divergence, loss.feature_weight, dtype, chunk, loss.objective
        ),
        new_head=functools.partial(new_eagle3, Eagle3Draft),
        head_config=eagle3_config,
    ),
    "peagle": Training(
        predicted=lambda loss: slice(2, None),
        objective=lambda loss, dtype, chunk: PEagleObjective(
            loss.retention, loss.least_retention, loss.position_decay, loss.divergence, dtype, chunk, loss.objective
        ),
        new_head=functools.partial(new_eagle3, PEagle),
        head_config=p_eagle_config,
    ),
    "dflash": Training(
        predicted=lambda loss: slice(2, None),
        objective=lambda loss, dtype, chunk: DFlashObjective(
            loss.anchors, loss.position_decay, loss.labels, loss.divergence, dtype, chunk, loss.objective
        ),
        new_head=new_dflash,
        head_config=dflash_config,
    ),
    "dspark": None,
    "medusa": None,
    "llama": None,
}


def training_of(settings: TrainSettings) -> Training:
    """Returns the entry of settings.kind, which is never a kind without training."""
    training = TRAINED[settings.kind]
    assert training is not None
    return training
