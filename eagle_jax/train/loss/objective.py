"""What a run minimises: the losses of EAGLE-3, EAGLE-1 and of a target, in one form.

An objective is a sum over positions divided by what they weigh, so that a batch can be had in pieces: `prepare` makes
of each piece what needs no gradient, `counts` weighs it, and `sums` is divided by the counts of all the pieces.

Letters: B batch, S positions, k steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from eagle_jax.models.target import Target
from eagle_jax.ops.causal import causal
from eagle_jax.ops.layout import layout
from eagle_jax.train.loss import eagle
from eagle_jax.train.loss.vocabulary import CHUNK, Labels, vocabulary_loss

Batch = Mapping[str, jax.Array]  # tokens, loss_mask [B, S], lengths [B]; documents and features where they are given
Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """Three pure functions; `model` is what is trained, `target` a head's target (None for a target's own training)."""

    def prepare(self, model: Any, target: Target | None, batch: Batch) -> Any:
        """What is learned from, made without a gradient: a pytree."""

    def counts(self, prepared: Any) -> Any:
        """What the positions weigh, to divide by: a pytree of sums."""

    def sums(
        self, model: Any, target: Target | None, prepared: Any, counts: Any, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss and metrics of a piece: its sums over positions, divided by the counts of the whole batch."""


@dataclasses.dataclass(frozen=True)
class Eagle3Objective:
    """sum_k weights[k] * (loss of step k + feature_weight * its feature regression).

    dtype: of the computation, None for the head's own.
    """

    weights: tuple[float, ...] = tuple(0.8**step for step in range(7))
    alignment: eagle.Alignment = "corrected"
    divergence: str = "cross_entropy"
    feature_weight: float = 0.0
    dtype: Any = None
    chunk: int = CHUNK

    def prepare(self, model, target, batch):
        return _examples(model, target, batch, self.chunk, documents=self.alignment != "official")

    def counts(self, prepared):
        learned, weights = eagle.eagle3_weights(prepared, len(self.weights), self.alignment)
        whole = jnp.full(len(self.weights), prepared.tokens.size, jnp.float32)
        return whole if self.alignment == "official" else weights.sum(axis=(1, 2)), learned.sum(axis=(1, 2))

    def sums(self, model, target, prepared, counts, key):
        del key
        total, learned = (jnp.maximum(count, 1) for count in counts)
        _, weights = eagle.eagle3_weights(prepared, len(self.weights), self.alignment)
        regress = self.feature_weight > 0
        sums, distances = eagle.eagle3_sums(
            model, target, prepared, weights, features=regress, dtype=self.dtype, chunk=self.chunk
        )
        losses = (sums.loss - sums.entropy if self.divergence == "kl" else sums.loss) / total
        feature_losses = distances / total
        whole = (jnp.asarray(self.weights, jnp.float32) * (losses + self.feature_weight * feature_losses)).sum()
        metrics = {"loss": whole, "losses": losses, "accuracies": sums.match / learned}
        return whole, metrics | ({"feature_losses": feature_losses} if regress else {})


@dataclasses.dataclass(frozen=True)
class Eagle1Objective:
    """SmoothL1 of the features + token_weight * cross-entropy; noise: see `eagle1_loss`."""

    token_weight: float = 0.1
    noise: bool = True
    dtype: Any = None
    chunk: int = CHUNK

    def prepare(self, model, target, batch):
        return _examples(model, target, batch, self.chunk)

    def counts(self, prepared):
        return eagle.eagle1_weights(prepared).sum()

    def sums(self, model, target, prepared, counts, key):
        total = jnp.maximum(counts, 1)
        weights = eagle.eagle1_weights(prepared)
        key = key if self.noise else None
        feature, token = eagle.eagle1_sums(model, target, prepared, weights, key, dtype=self.dtype, chunk=self.chunk)
        whole = (feature + self.token_weight * token.loss) / total
        metrics = {"feature_loss": feature, "token_loss": token.loss, "accuracy": token.match}
        return whole, {"loss": whole} | {name: value / total for name, value in metrics.items()}


@dataclasses.dataclass(frozen=True)
class TargetObjective:
    """The cross-entropy of the next token, where it is to be learned."""

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

        def attend(index, q, k, v):
            return causal(q, k, v, text), None

        out, _ = model.run(tokens, text.positions, attend, prompt_lengths=text.end - text.first)
        sums = vocabulary_loss(out.hidden, model.output_weight(), Labels(following), weights, self.chunk)
        total = jnp.maximum(counts, 1)
        return sums.loss / total, {"loss": sums.loss / total, "accuracy": sums.match / total}


def _examples(model, target, batch, chunk, documents=True):
    """The target's pass over a batch, or what a file holds of it."""
    packed = batch.get("documents") if documents else None
    if "features" not in batch:
        return eagle.examples(model, target, batch["tokens"], batch["lengths"], batch["loss_mask"], packed, chunk)
    text = layout(batch["lengths"], batch["tokens"].shape[1], packed)
    return eagle.with_features(
        model, target, batch["tokens"], batch["loss_mask"], text, batch["features"], batch["answers"], chunk
    )
