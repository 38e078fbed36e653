"""Settings of a training run: typed fields with defaults, read from YAML; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from eagle_jax.convert.engines import ENGINES
from eagle_jax.drafts.dflash import DFlashConfig
from eagle_jax.drafts.eagle.p_eagle import PEagleConfig

LIMIT = 2**31  # steps are counted in int32, and seeds are that wide
Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]


class Settings(pydantic.BaseModel):
    """Base class: frozen. Unknown keys, wrong types and numbers that are not finite are errors that name the key."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(Settings):
    """The training data.

    train: JSON Lines files or JSON arrays; data/records.py lists the forms of records.
    held_out: such files for evaluation.
    row_length: tokens of a sequence of the batch.
    packing: pack several documents into a sequence. Otherwise each is padded to the shortest of `buckets` that fits.
    buckets: sequence lengths, ascending; empty: row_length alone.
    on_error: "refuse" stops at the first bad line, "skip" counts it.
    too_long: the treatment of documents longer than row_length.
    chat_template: a Jinja file that replaces the tokenizer's template.
    add_end: append the end-of-text token to texts and completions.
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

    draft_vocab_size: the vocabulary of EAGLE-3 and P-EAGLE, the most frequent tokens; None: the target's.
    intermediate_size, num_heads, num_kv_heads, head_dim: None: the target's.
    rope_theta: 10000 as in the official trainer.
    taps: the target layers whose input the head reads; None: `spaced_taps` for DFlash, else 2, n // 2 and n - 3.
      EAGLE-1 reads none.
    num_layers: decoder layers of any head but EAGLE-1's; published P-EAGLE heads have 4, DFlash heads 5. windows: the
      sliding window of each, null for full attention.
    qk_norm: RMSNorm of every query head and key head.
    norm_before_residual: add the layer's output to the normalised hidden state.
    fc_norm, norm_before_fc, norm_output: the norms of EAGLE-3.1, see `DraftConfig`.
    block_size: of DFlash, the tokens of a block, the last one that the target chose included.
    num_depths: of P-EAGLE, the tokens that a pass drafts.
    mask_token_id: of DFlash and P-EAGLE, a token of the target's that no text has; it stands for unknown tokens.
    causal: of DFlash, whether a token of the block sees only those before it, as JetSpec's do.
    """

    draft_vocab_size: pydantic.PositiveInt | None = None
    intermediate_size: pydantic.PositiveInt | None = None
    num_heads: pydantic.PositiveInt | None = None
    num_kv_heads: pydantic.PositiveInt | None = None
    head_dim: Annotated[int, pydantic.Field(gt=0, multiple_of=2)] | None = None
    rope_theta: pydantic.PositiveFloat = 10000.0
    taps: Annotated[tuple[pydantic.NonNegativeInt, ...], pydantic.Field(min_length=1)] | None = None
    num_layers: pydantic.PositiveInt = 1
    windows: tuple[pydantic.PositiveInt | None, ...] = ()
    qk_norm: bool = False
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    block_size: Annotated[int, pydantic.Field(ge=2)] = DFlashConfig.block_size
    num_depths: Annotated[int, pydantic.Field(ge=2)] = PEagleConfig.num_depths
    mask_token_id: pydantic.NonNegativeInt | None = None
    causal: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> HeadSettings:
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc exclude each other")
        return self

    @property
    def parts(self) -> dict[str, Any]:
        """Returns the settings of the layers and norms of an EAGLE-3 or P-EAGLE head, as fields of a `DraftConfig`."""
        names = ("num_layers", "windows", "qk_norm", "norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")
        return {name: getattr(self, name) for name in names}


class LossSettings(Settings):
    """The losses; loss/eagle.py, loss/p_eagle.py and loss/dflash.py define them.

    steps: of EAGLE-3's training-time test. Step k weighs step_weights[k]; None: step_decay ** k.
    alignment: of EAGLE-3, see `eagle3_loss`. divergence: of any head but EAGLE-1's.
    objective: of a token, of any head. "lk" and "lk_adaptive" train on the probability of acceptance.
    feature_weight: of EAGLE-3's regression to the target's last hidden states. The paper has none (0); with little data
      it teaches faster.
    token_weight: of EAGLE-1's cross-entropy, added to the feature regression.
    noise: add the official uniform noise to EAGLE-1's features.
    anchors: of DFlash, the blocks of a sequence that a step learns. position_decay: mask token k of a block weighs
      exp(-(k - 1) / position_decay); None: half a block. Depth d of P-EAGLE weighs exp(-d / position_decay); None: 1.
    retention: of P-EAGLE: depth d learns max(retention ** d, least_retention) of the positions, drawn at random.
    labels: of DFlash: learn the target's distribution, or the tokens of the data.
    """

    steps: pydantic.PositiveInt = 7
    step_decay: pydantic.PositiveFloat = 0.8
    step_weights: tuple[pydantic.NonNegativeFloat, ...] | None = None
    alignment: Literal["corrected", "official"] = "corrected"
    divergence: Literal["cross_entropy", "kl"] = "cross_entropy"
    objective: Literal["cross_entropy", "lk", "lk_adaptive"] = "cross_entropy"
    feature_weight: pydantic.NonNegativeFloat = 0.0
    token_weight: pydantic.NonNegativeFloat = 0.1
    noise: bool = True
    anchors: pydantic.PositiveInt = 32
    position_decay: pydantic.PositiveFloat | None = None
    retention: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.7
    least_retention: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.2
    labels: Literal["target", "data"] = "target"

    @pydantic.model_validator(mode="after")
    def _check(self) -> LossSettings:
        if self.step_weights is not None and len(self.step_weights) != self.steps:
            raise ValueError(f"step_weights has {len(self.step_weights)} entries for {self.steps} steps")
        if self.divergence == "kl" and self.objective != "cross_entropy":
            raise ValueError(f"divergence kl is of cross-entropy, not of objective {self.objective}")
        if self.labels == "data" and (self.divergence, self.objective) != ("cross_entropy", "cross_entropy"):
            raise ValueError(
                "labels data are learned by cross-entropy; the other losses need the target's distribution"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Returns the weight of each step."""
        return self.step_weights or tuple(self.step_decay**step for step in range(self.steps))


def _of(kinds: tuple[str, ...], section: str, *names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys((f"{section}.{name}" for name in names), kinds)


# Settings that only some kinds have; for the others they must keep their defaults.
KINDS_WITH = {
    **_of(("eagle3", "peagle", "dflash"), "head", "num_layers", "windows"),
    **_of(("eagle3", "peagle"), "head", "qk_norm", "norm_before_residual", "fc_norm", "norm_before_fc", "norm_output"),
    **_of(("dflash", "peagle"), "head", "mask_token_id"),
    **_of(("dflash", "peagle"), "loss", "position_decay"),
    **_of(("dflash",), "head", "block_size", "causal"),
    **_of(("dflash",), "loss", "anchors", "labels"),
    **_of(("peagle",), "head", "num_depths"),
    **_of(("peagle",), "loss", "retention", "least_retention"),
    **_of(("eagle3", "eagle1", "peagle", "target"), "head", "draft_vocab_size"),
    **_of(("eagle3", "eagle1", "target"), "loss", "steps", "step_decay", "step_weights", "alignment"),
    **_of(("eagle3", "eagle1", "target"), "loss", "feature_weight", "token_weight", "noise"),
}


class OptimizerSettings(Settings):
    """AdamW, or Muon for the matrices and Adam for the rest, with schedule and clipping.

    learning_rate: the peak. adam_learning_rate: of Adam's part under Muon; None: the same.
    schedule: follows a linear warm-up over warmup_steps. "linear" and "cosine" decay to final_fraction of the peak at
      the run's end, or at decay_steps. "trapezoid" is constant, then linear over the last fifth.
    clip_norm: limits the norm of the whole gradient. clip_value: limits each entry.
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
    """Devices per mesh axis; neighbouring devices share the last axis.

    data shards the batch, fsdp batch and parameters, expert the experts of a head's target, tensor the matrix products.
    """

    data: pydantic.PositiveInt = 1
    fsdp: pydantic.PositiveInt = 1
    expert: pydantic.PositiveInt = 1
    tensor: pydantic.PositiveInt = 1


class CheckpointSettings(Settings):
    """every: steps between checkpoints. keep: number of latest ones; the best by evaluation is kept as well."""

    every: pydantic.PositiveInt = 500
    keep: pydantic.PositiveInt = 2


class EvaluationSettings(Settings):
    """Evaluation during training: the held-out loss, and decoding of held-out prompts.

    every: steps between evaluations.
    prompts: number of held-out documents to continue, from their first prompt_tokens tokens or a chat's first question.
      0: decode nothing; then the best model is the one of the least held-out loss.
    new_tokens: tokens decoded per prompt.
    tree: as --tree: "depth,top_k,num_nodes" or "chain:5". Without it a DFlash or P-EAGLE head has the best 16 nodes of
      a pass.
    loss_batches: number of batches for the held-out loss.
    """

    every: pydantic.PositiveInt = 500
    prompts: pydantic.NonNegativeInt = 8
    prompt_tokens: pydantic.PositiveInt = 32
    new_tokens: pydantic.PositiveInt = 64
    tree: str = "6,4,16"
    loss_batches: pydantic.PositiveInt = 8


class TrainSettings(Settings):
    """All settings of a run.

    kind: trains an EAGLE-3, EAGLE-1, P-EAGLE or DFlash head, or a target by its next-token loss.
    target: of a head: a folder or hub id, OWNER/NAME or OWNER/NAME@REVISION.
    model: of kind target: the config.json of random weights, next to which the tokenizer lies.
    start: a model of this kind to continue from, named like a target; None: random weights.
    output: the run's folder.
    features: a folder written by `eagle-jax train --precompute`; None: run the target in each step. With features, the
      target's layers are loaded only if the evaluation decodes.
    steps, epochs: the length of the run, one of them.
    batch_tokens: tokens of a step. accumulation: micro-batches of a step.
    dtype: of the computation; master weights are float32.
    save_dtype, save_format: of the written model; docs/export.md lists the formats.
    """

    kind: Literal["eagle3", "eagle1", "peagle", "dflash", "target"]
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
    save_format: str = "official"
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
        if self.loss.objective != "cross_entropy" and self.kind == "target":
            raise ValueError("loss.objective is for heads; a target learns by cross-entropy")
        if self.save_format not in ENGINES:
            raise ValueError(f"save_format must be one of {', '.join(ENGINES)}, got {self.save_format!r}")
        for name, kinds in KINDS_WITH.items():
            section, field = name.split(".")
            ours = getattr(self, section)
            if self.kind not in kinds and getattr(ours, field) != type(ours).model_fields[field].default:
                raise ValueError(f"{name} is for kind {' or '.join(kinds)}, not {self.kind}")
        if self.kind in ("dflash", "peagle"):
            self._check_mask()
        if self.features is not None and self.kind == "target":
            raise ValueError("features are for heads; a target has none")
        for length in self.data.buckets or (self.data.row_length,):
            self.rows(length)
        return self

    def _check_mask(self) -> None:
        """Requires the mask token of a head that drafts in one pass, and gives its evaluation the best tree of it."""
        if self.head.mask_token_id is None:
            raise ValueError(
                f"kind {self.kind} needs head.mask_token_id: the id of a token of the target's vocabulary that no text "
                "has"
            )
        if "tree" not in self.evaluation.model_fields_set:
            deepest = self.head.block_size - 1 if self.kind == "dflash" else self.head.num_depths
            tree = {"tree": f"best:{deepest},16"}
            object.__setattr__(self, "evaluation", self.evaluation.model_copy(update=tree))

    def rows(self, length: int) -> int:
        """Returns the batch size for sequences of this length.

        Raises:
          ValueError: if it does not divide by the micro-batches and the devices.
        """
        rows, parts = self.batch_tokens // length, self.accumulation * self.mesh.data * self.mesh.fsdp
        if not rows or rows % parts:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} make {rows} rows of {length}, which accumulation * mesh.data * "
                f"mesh.fsdp = {parts} does not divide"
            )
        return rows


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Reads settings from a YAML file, with overrides such as "optimizer.learning_rate=1e-4".

    Raises:
      ValueError: naming the file and the keys that are unknown or wrong.
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
