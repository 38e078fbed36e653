"""The loss of a one-pass drafter: blocks at random anchors, each as a cycle of decoding runs it (arXiv 2602.06036).

Letters: B batch, S positions, n blocks of a sequence, L tokens of a block, F width of the features, H of the target.

The anchor is a token of the text at position p. The block is this token and L - 1 mask tokens, at the positions from p
on. It sees the features of the positions before p, and the output at its k-th mask token predicts the token at p + k.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.drafts.dflash import DFlash
from eagle_jax.models.rope import rope_angles
from eagle_jax.models.target import Target, logit_softcap
from eagle_jax.ops.blocks import block_attention
from eagle_jax.ops.layout import Layout, layout
from eagle_jax.ops.spec import PLAIN
from eagle_jax.train.loss import eagle
from eagle_jax.train.loss.objective import Batch
from eagle_jax.train.loss.vocabulary import CHUNK, Labels, Soft, TokenLoss, vocabulary_loss


class Examples(NamedTuple):
    """A batch, and the target's outputs for it; fields as in `eagle.Examples`."""

    tokens: jax.Array
    loss_mask: jax.Array
    text: Layout
    features: jax.Array
    answers: jax.Array


class Blocks(NamedTuple):
    """Chosen anchors [B, n], their positions in the sequence, and the weights of their mask tokens [B, n, L - 1]."""

    anchors: jax.Array
    weights: jax.Array


def examples(draft: DFlash, target: Target, batch: Batch) -> Examples:
    """Runs the target over a batch, or takes its precomputed features."""
    tokens, mask = batch["tokens"], batch["loss_mask"].astype(jnp.float32)
    if "features" in batch:
        text = layout(batch["lengths"], tokens.shape[1], batch.get("documents"))
        made = Examples(tokens, mask, text, batch["features"], batch["answers"])
    else:
        text, out = eagle.target_outputs(draft, target, tokens, batch["lengths"], batch.get("documents"))
        assert out.taps is not None
        made = Examples(tokens, mask, text, out.taps, out.hidden)
    return jax.lax.stop_gradient(made)


def choose_blocks(made: Examples, key: jax.Array, count: int, size: int, decay: float) -> Blocks:
    """Draws `count` anchors of each sequence at random, without replacement.

    The token after an anchor is to be learned, and a position of its document stands before it, as in decoding. Missing
    anchors have weights of zero. Mask token k weighs exp(-(k - 1) / decay) if the token there is to be learned and lies
    inside the document.
    """
    width = made.tokens.shape[1]
    ahead = jnp.arange(1, size, dtype=jnp.int32)[None, None]
    learned = jnp.pad(made.loss_mask, [(0, 0), (0, size)])
    row = jnp.arange(width, dtype=jnp.int32)[None]
    usable = (made.text.positions > 0) & (row + 1 < made.text.end) & (learned[:, 1 : width + 1] > 0)
    order = jnp.where(usable, jax.random.uniform(key, usable.shape), -1)
    drawn, anchors = jax.lax.top_k(order, min(count, width))
    anchors = anchors.astype(jnp.int32)
    places = anchors[:, :, None] + ahead  # [B, n, L - 1]
    wanted = jnp.take_along_axis(learned, places.reshape(len(places), -1), axis=1).reshape(places.shape)
    inside = places < jnp.take_along_axis(made.text.end, anchors, axis=1)[:, :, None]
    falling = jnp.exp(-(ahead - 1) / decay).astype(jnp.float32)
    return Blocks(anchors, wanted * inside * falling * (drawn >= 0)[:, :, None])


@jax.named_scope("dflash_loss")
def block_outputs(
    draft: DFlash, target: Target, made: Examples, anchors: jax.Array, size: int, dtype: Any = None
) -> jax.Array:
    """Runs the blocks at `anchors` [B, n]; returns the normalised outputs of their mask tokens, [B, n, L - 1, H].

    Args:
      dtype: of the head's computation; None: the head's.
    """
    head, text = eagle.in_dtype(draft, dtype), made.text
    config, (batch, count) = head.config, anchors.shape
    lengths = text.end - text.first

    def at_anchors(values):  # [B, S] -> [B, n, 1]
        return jnp.take_along_axis(values, anchors, axis=1)[:, :, None]

    masks = jnp.full((batch, count, size - 1), config.mask_token_id, made.tokens.dtype)
    tokens = jnp.concatenate([at_anchors(made.tokens), masks], axis=2).reshape(batch, -1)
    positions = (at_anchors(text.positions) + jnp.arange(size, dtype=jnp.int32)[None, None]).reshape(batch, -1)
    of_blocks = jnp.repeat(at_anchors(lengths)[:, :, 0], size, axis=1)
    rotation = rope_angles(config.rope, config.head_dim, positions, of_blocks)
    context = head.context(made.features, rope_angles(config.rope, config.head_dim, text.positions, lengths))

    def attend(index, q, k, v, spec=PLAIN):
        return block_attention(q, k, v, context[index], anchors, text, spec, config.is_causal(index)), None

    return head.run_block(target, tokens, rotation, attend).reshape(batch, count, size, -1)[:, :, 1:]


@dataclasses.dataclass(frozen=True)
class DFlashObjective:
    """The loss of a DFlash head: the mean of the token losses of random blocks, weighted as `choose_blocks` says.

    anchors: blocks of a sequence in a step.
    position_decay: of the weights; None: half a block (7, 5 and 4 were published for blocks of 16, 10 and 8).
    labels: learn the target's distribution, or the tokens of the data, as published.
    divergence, token_loss: see `eagle3_loss`.
    dtype, chunk: as in `Eagle3Objective`.
    """

    anchors: int = 32
    position_decay: float | None = None
    labels: Literal["target", "data"] = "target"
    divergence: Literal["cross_entropy", "kl"] = "cross_entropy"
    dtype: Any = None
    chunk: int = CHUNK
    token_loss: TokenLoss = "cross_entropy"

    def __post_init__(self) -> None:
        eagle.check_token_loss(self.token_loss, self.divergence)
        if self.labels not in ("target", "data"):
            raise ValueError(f'labels must be "target" or "data", got {self.labels!r}')

    def prepare(self, model, target, batch):
        return examples(model, target, batch)

    def draw(self, model, prepared, key):
        size = model.config.block_size
        return prepared, choose_blocks(prepared, key, self.anchors, size, self.position_decay or size / 2)

    def counts(self, prepared):
        _, blocks = prepared
        return blocks.weights.sum()

    def sums(self, model, target, prepared, counts, key):
        del key
        made, (anchors, weights) = prepared
        size = model.config.block_size
        x = block_outputs(model, target, made, anchors, size, self.dtype)
        ahead = jnp.arange(size - 1, dtype=jnp.int32)[None, None]
        before = (anchors[:, :, None] + ahead).reshape(len(anchors), -1)  # the positions whose next token is predicted
        teacher: Labels | Soft
        if self.labels == "data":
            teacher = Labels(jnp.take_along_axis(jnp.pad(made.tokens, [(0, 0), (0, size)]), before + 1, axis=1))
        else:
            within = jnp.minimum(before, made.tokens.shape[1] - 1)[:, :, None]
            hidden = jnp.take_along_axis(made.answers, within, axis=1)
            teacher = Soft(hidden, jax.lax.stop_gradient(target.output_weight()), logit_softcap(target))
        weight = jax.lax.stop_gradient(target.output_weight())
        x = x.reshape(len(anchors), -1, x.shape[-1]).astype(weight.dtype)
        weights = weights.reshape(len(anchors), -1)
        with jax.named_scope("dflash_loss"):
            sums = vocabulary_loss(
                x, weight, teacher, weights, self.chunk, self.token_loss, softcap=logit_softcap(target)
            )
        total = jnp.maximum(counts, 1e-6)
        loss = (sums.loss - sums.entropy if self.divergence == "kl" else sums.loss) / total
        return loss, {"loss": loss, "accuracy": sums.match / total}
