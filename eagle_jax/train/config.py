"""The settings of a training run: typed, read from YAML, every field with its default; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

LIMIT = 2**31  # steps are counted in int32, and seeds are that wide
Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]


class Settings(pydantic.BaseModel):
    """Frozen; an unknown key, a value of another type, or a number that is not finite is an error that names it."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(Settings):
    """What is learned from.

    train, held_out: JSON Lines files or JSON arrays; see data/records.py for their records. held_out is for evaluation.
    row_length: tokens of a row. packing: several documents a row; else one, padded to the shortest of `buckets` (row
    lengths, ascending; empty: row_length alone) that holds it.
    on_error, too_long: what to do with bad lines, and with documents longer than a row.
    chat_template: a Jinja file, in place of the tokenizer's own. add_end: end a text with the end-of-text token.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    row_length: pydantic.PositiveInt = 2048
    packing: bool = True
    buckets: tuple[pydantic.PositiveInt, ...] = ()
    on_error: Literal["refuse", "skip"] = "refuse"
    too_long: Literal["refuse", "skip", "truncate", "split"] = "truncate"
    chat_template: str | None = None
    add_end: bool = True

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataSettings:
        if not self.train:
            raise ValueError("train: name at least one file")
        if list(self.buckets) != sorted(set(self.buckets)) or (self.buckets and self.buckets[-1] != self.row_length):
            raise ValueError(f"buckets must ascend to row_length {self.row_length}, got {list(self.buckets)}")
        if self.buckets and self.packing:
            raise ValueError("buckets are for rows of one document; set packing: false")
        return self


class HeadSettings(Settings):
    """The shape of a new head.

    draft_vocab_size: EAGLE-3's, chosen by frequency; None: the target's vocabulary.
    intermediate_size, num_heads, num_kv_heads, head_dim, rope_theta: the target's own by default (rope_theta: 10000,
    which the official trainer uses). taps: the target layers that EAGLE-3 reads; None: 2, n // 2 and n - 3.
    """

    draft_vocab_size: pydantic.PositiveInt | None = None
    intermediate_size: pydantic.PositiveInt | None = None
    num_heads: pydantic.PositiveInt | None = None
    num_kv_heads: pydantic.PositiveInt | None = None
    head_dim: Annotated[int, pydantic.Field(gt=0, multiple_of=2)] | None = None
    rope_theta: pydantic.PositiveFloat = 10000.0
    taps: Annotated[tuple[pydantic.NonNegativeInt, ...], pydantic.Field(min_length=1)] | None = None


class LossSettings(Settings):
    """See loss/eagle.py.

    EAGLE-3: steps, step_weights (one a step; None: step_decay ** k), alignment, divergence, and feature_weight, of a
    regression to the target's last hidden states beside the cross-entropy: 0 as in the paper, more for little data.
    EAGLE-1: token_weight, of the cross-entropy beside the feature regression, and noise on the features.
    """

    steps: pydantic.PositiveInt = 7
    step_decay: pydantic.PositiveFloat = 0.8
    step_weights: tuple[pydantic.NonNegativeFloat, ...] | None = None
    alignment: Literal["corrected", "official"] = "corrected"
    divergence: Literal["cross_entropy", "kl"] = "cross_entropy"
    feature_weight: pydantic.NonNegativeFloat = 0.0
    token_weight: pydantic.NonNegativeFloat = 0.1
    noise: bool = True

    @pydantic.model_validator(mode="after")
    def _check(self) -> LossSettings:
        if self.step_weights is not None and len(self.step_weights) != self.steps:
            raise ValueError(f"step_weights has {len(self.step_weights)} entries for {self.steps} steps")
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the steps."""
        return self.step_weights or tuple(self.step_decay**step for step in range(self.steps))


class OptimizerSettings(Settings):
    """AdamW (or Muon for the matrices with Adam for the rest), its schedule and clipping.

    learning_rate: the peak. adam_learning_rate: of what Muon leaves to Adam; None: the same.
    schedule: after a linear warm-up over warmup_steps: "linear" or "cosine" down to final_fraction of the peak at the
    run's end (or at decay_steps), "constant", or "trapezoid": constant, then linear over the last fifth.
    clip_norm: of the whole gradient. clip_value: of every entry.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: pydantic.PositiveFloat = 5e-5
    adam_learning_rate: pydantic.PositiveFloat | None = None
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: pydantic.NonNegativeFloat = 0.0
    schedule: Literal["linear", "cosine", "constant", "trapezoid"] = "linear"
    warmup_steps: pydantic.NonNegativeInt = 0
    decay_steps: pydantic.PositiveInt | None = None
    final_fraction: pydantic.NonNegativeFloat = 0.0
    clip_norm: pydantic.PositiveFloat | None = 0.5
    clip_value: pydantic.PositiveFloat | None = None


class MeshSettings(Settings):
    """Devices an axis: data splits the batch; fsdp splits the batch and the parameters; tensor splits the products."""

    data: pydantic.PositiveInt = 1
    fsdp: pydantic.PositiveInt = 1
    tensor: pydantic.PositiveInt = 1


class CheckpointSettings(Settings):
    """every: steps between checkpoints. keep: how many of the latest; the best by evaluation is kept beside them."""

    every: pydantic.PositiveInt = 500
    keep: pydantic.PositiveInt = 2


class EvaluationSettings(Settings):
    """Decoding of held-out prompts while training.

    every: steps. prompts: how many held-out documents; their first prompt_tokens tokens (a conversation's up to its
    first answer) are the prompt. new_tokens: decoded of each. tree: as --tree, "depth,top_k,num_nodes" or "chain:5".
    loss_batches: of held-out rows, for the loss.
    """

    every: pydantic.PositiveInt = 500
    prompts: pydantic.PositiveInt = 8
    prompt_tokens: pydantic.PositiveInt = 32
    new_tokens: pydantic.PositiveInt = 64
    tree: str = "6,4,16"
    loss_batches: pydantic.PositiveInt = 8


class TrainSettings(Settings):
    """A run.

    kind: what is trained: an EAGLE-3 head, an EAGLE-1 head, or a target (next-token loss).
    target: a head's target, a folder or hub id. model: a target's config.json, for random weights, beside which its
    tokenizer lies.
    start: a model of the kind to go on from, a folder or hub id; None: random weights.
    output: the run's folder. features: a folder that `eagle-jax train --precompute` wrote; None: the live target.
    steps or epochs: how long. batch_tokens: tokens a step, in all rows. accumulation: pieces that a step's batch is
    gone through in. dtype: of the computation; masters are float32. save_dtype: of the model that is written;
    save_format: whose names and config fields a head is written with, see docs/export.md.
    """

    kind: Literal["eagle3", "eagle1", "target"]
    output: str
    target: str | None = None
    model: str | None = None
    start: str | None = None
    features: str | None = None
    data: DataSettings
    head: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    steps: Annotated[int, pydantic.Field(gt=0, lt=LIMIT)] | None = None
    epochs: Annotated[float, pydantic.Field(gt=0, lt=LIMIT)] | None = None
    batch_tokens: pydantic.PositiveInt = 8192
    accumulation: pydantic.PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    save_format: Literal["official", "sglang", "vllm"] = "official"
    mesh: MeshSettings = MeshSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    log_every: pydantic.PositiveInt = 10
    seed: Annotated[int, pydantic.Field(ge=0, lt=LIMIT)] = 0

    @pydantic.model_validator(mode="after")
    def _check(self) -> TrainSettings:
        needed, other = ("model", "target") if self.kind == "target" else ("target", "model")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"kind {self.kind} needs {needed}, and no {other}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of them")
        if self.loss.alignment == "official" and self.data.packing:
            raise ValueError("loss.alignment official knows one document a row; set data.packing: false")
        if self.features is not None and self.kind == "target":
            raise ValueError("features are for heads; a target has none")
        for length in self.data.buckets or (self.data.row_length,):
            self.rows(length)
        return self

    def rows(self, length: int) -> int:
        """Rows of a batch whose rows are of this length.

        Raises:
          ValueError: if they do not divide by the pieces and the devices.
        """
        rows, parts = self.batch_tokens // length, self.accumulation * self.mesh.data * self.mesh.fsdp
        if not rows or rows % parts:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} make {rows} rows of {length}, which accumulation * mesh.data * "
                f"mesh.fsdp = {parts} does not divide"
            )
        return rows


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """The settings in a YAML file, with overrides such as "optimizer.learning_rate=1e-4".

    Raises:
      ValueError: naming the file and the key, for what is no setting.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: settings are `key: value` lines")
    for override in overrides:
        _override(values, override)
    try:
        return TrainSettings(**values)
    except pydantic.ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            what = (
                "no such setting" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
            )
            faults.append(f"{key}: {what}" if key else what)
        raise ValueError(f"{path}: " + "; ".join(faults)) from error


def _override(values: dict[str, Any], override: str) -> None:
    """Sets "a.b=value" in nested dictionaries."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override is key=value, such as optimizer.learning_rate=1e-4; got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{override}: {section} is no section of settings")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override}: not a YAML value") from error
