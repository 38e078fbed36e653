"""The objectives of training: the losses of EAGLE-3, EAGLE-1 and of a target behind one protocol.

An objective is a weighted mean over positions, computed per micro-batch: `prepare` runs the frozen part, `counts`
returns the weights' sums, and `sums` the weighted losses over the counts of the whole batch.

Letters: B batch, S positions, k steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from eagle_jax.models.target import Target, logit_softcap
from eagle_jax.ops.attention import causal
from eagle_jax.ops.layout import layout
from eagle_jax.ops.spec import PLAIN
from eagle_jax.train.loss import eagle
from eagle_jax.train.loss.vocabulary import CHUNK, Labels, TokenLoss, vocabulary_loss, weighted_loss

Batch = Mapping[str, jax.Array]  # tokens, loss_mask [B, S], lengths [B]; documents and features where they are given
Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """Three pure functions of `model`, which is trained, and a head's `target` (None if a target is trained)."""

    def prepare(self, model: Any, target: Target | None, batch: Batch) -> Any:
        """Computes everything that needs no gradient, such as the target's features: a pytree."""

    def counts(self, prepared: Any) -> Any:
        """Returns the sums of the positions' weights, the denominators: a pytree."""

    def sums(
        self, model: Any, target: Target | None, prepared: Any, counts: Any, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Returns loss and metrics of a micro-batch: its sums, divided by the counts of the whole batch."""


@runtime_checkable
class Drawing(Protocol):
    """An objective that learns a random part of every micro-batch: `draw` runs after `prepare`, before `counts`."""

    def draw(self, model: Any, prepared: Any, key: jax.Array) -> Any:
        """Returns what `prepare` made, with the part to learn. `model` may be abstract; `sums` gets the same key."""


def drawn(objective: Objective, model: Any, prepared: Any, key: jax.Array) -> Any:
    """Returns what `counts` and `sums` take: `prepared`, or what the objective draws from it."""
    return objective.draw(model, prepared, key) if isinstance(objective, Drawing) else prepared


@dataclasses.dataclass(frozen=True)
class Eagle3Objective:
    """The loss of an EAGLE-3 head: the sum over steps k of weights[k] * (loss + feature_weight * feature regression).

    weights: one per step of the training-time test.
    alignment, divergence, token_loss: see `eagle3_loss`.
    feature_weight: of a regression to the target's last hidden states; 0 as in the paper.
    dtype: of the computation; None: the model's.
    chunk: positions whose logits exist at a time.
    """

    weights: tuple[float, ...] = tuple(0.8**step for step in range(7))
    alignment: eagle.Alignment = "corrected"
    divergence: str = "cross_entropy"
    feature_weight: float = 0.0
    dtype: Any = None
    chunk: int = CHUNK
    token_loss: TokenLoss = "cross_entropy"

    def __post_init__(self) -> None:
        eagle.check_token_loss(self.token_loss, self.divergence)

    def prepare(self, model, target, batch):
        if self.feature_weight > 0 and model.config.hidden_size != target.config.hidden_size:
            raise ValueError(
                f"a regression of features needs a head as wide as its target, {target.config.hidden_size}, not "
                f"{model.config.hidden_size}: set loss.feature_weight to 0"
            )
        return examples(model, target, batch, self.chunk, documents=self.alignment != "official")

    def counts(self, prepared):
        learned, weights = eagle.eagle3_weights(prepared, len(self.weights), self.alignment)
        whole = jnp.full(len(self.weights), prepared.tokens.size, jnp.float32)
        return whole if self.alignment == "official" else weights.sum(axis=(1, 2)), learned.sum(axis=(1, 2))

    def sums(self, model, target, prepared, counts, key):
        del key
        total, learned = (jnp.maximum(count, 1) for count in counts)
        _, weights = eagle.eagle3_weights(prepared, len(self.weights), self.alignment)
        outputs = eagle.eagle3_outputs(model, target, prepared, len(self.weights), self.dtype)
        step_weights = jnp.asarray(self.weights, jnp.float32) / total
        with jax.named_scope("eagle3_loss"):
            loss, sums = weighted_loss(
                *outputs.logits_from, weights, step_weights, self.chunk, self.token_loss, outputs.softcap
            )
        metrics = {"losses": sums.loss / total, "accuracies": sums.match / learned}
        if self.divergence == "kl":
            loss -= (step_weights * sums.entropy).sum()
            metrics["losses"] -= sums.entropy / total
        if self.feature_weight > 0:
            distances = eagle.feature_distances(outputs, weights)
            loss += self.feature_weight * (step_weights * distances).sum()
            metrics["feature_losses"] = distances / total
        return loss, {"loss": loss} | metrics


@dataclasses.dataclass(frozen=True)
class Eagle1Objective:
    """The loss of an EAGLE-1 head: SmoothL1 of the features + token_weight * token loss.

    noise: add the official uniform noise to the features, see `eagle1_loss`.
    dtype, chunk, token_loss: as in `Eagle3Objective`.
    """

    token_weight: float = 0.1
    noise: bool = True
    dtype: Any = None
    chunk: int = CHUNK
    token_loss: TokenLoss = "cross_entropy"

    def __post_init__(self) -> None:
        eagle.check_token_loss(self.token_loss)

    def prepare(self, model, target, batch):
        return examples(model, target, batch, self.chunk)

    def counts(self, prepared):
        return eagle.eagle1_weights(prepared).sum()

    def sums(self, model, target, prepared, counts, key):
        total = jnp.maximum(counts, 1)
        weights = eagle.eagle1_weights(prepared)
        key = key if self.noise else None
        options = {"dtype": self.dtype, "chunk": self.chunk, "token_loss": self.token_loss}
        feature, token = eagle.eagle1_sums(model, target, prepared, weights, key, **options)
        whole = (feature + self.token_weight * token.loss) / total
        metrics = {"feature_loss": feature, "token_loss": token.loss, "accuracy": token.match}
        return whole, {"loss": whole} | {name: value / total for name, value in metrics.items()}


@dataclasses.dataclass(frozen=True)
class TargetObjective:
    """The loss of a target: the cross-entropy of the next token where the loss mask is 1."""

    dtype: Any = None
    chunk: int = CHUNK

    def prepare(self, model, target, batch):
        tokens, mask = batch["tokens"], batch["loss_mask"]
        text = layout(batch["lengths"], tokens.shape[1], batch["documents"])
        inside = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + 1 < text.end
        following = jnp.pad(tokens, [(0, 0), (0, 1)])[:, 1:]
        return tokens, text, following, jnp.pad(mask, [(0, 0), (0, 1)])[:, 1:] * inside.astype(jnp.float32)

    def counts(self, prepared):
        return prepared[3].sum()

    @jax.named_scope("target_loss")
    def sums(self, model, target, prepared, counts, key):
        tokens, text, following, weights = prepared
        model = eagle.in_dtype(model, self.dtype)

        def attend(index, q, k, v, spec=PLAIN):
            return causal(q, k, v, text, spec), None

        out, _ = model.run(tokens, text.positions, attend, prompt_lengths=text.end - text.first)
        sums = vocabulary_loss(
            out.hidden,
            model.output_weight(),
            Labels(following),
            weights,
            self.chunk,
            softcap=logit_softcap(model),
        )
        total = jnp.maximum(counts, 1)
        return sums.loss / total, {"loss": sums.loss / total, "accuracy": sums.match / total}


def examples(model, target, batch, chunk, documents=True):
    """Runs the target over a batch, or takes its precomputed features."""
    packed = batch.get("documents") if documents else None
    if "features" not in batch:
        return eagle.examples(model, target, batch["tokens"], batch["lengths"], batch["loss_mask"], packed, chunk)
    text = layout(batch["lengths"], batch["tokens"].shape[1], packed)
    return eagle.with_features(
        model, target, batch["tokens"], batch["loss_mask"], text, batch["features"], batch["answers"], chunk
    )
