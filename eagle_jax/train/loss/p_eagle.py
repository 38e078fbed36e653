"""The loss of a P-EAGLE head: all depths in one pass, the later ones at sampled positions (arXiv 2602.01469).

Letters: B batch, S positions, K depths, n chains of a sequence, M mask rows of all its chains, D width of the head.

A pair j is the target's feature at j and the token at j + 1; it predicts the token at j + 2, depth 0. A chain begins at
a pair j: its mask row d >= 1 stands at position j + d and predicts the token at j + 2 + d. What a row sees is what it
sees in decoding, and a static rule:

    a pair            the pairs of its document up to itself
    mask row d of j   the pairs of its document up to j, and rows 1 to d of its own chain

Conditional drop-token (COD): N pairs of a sequence have a next token to learn. Depth d learns floor(N s(d)) of them,
drawn at random, with s(d) = max(retention ** d, least_retention). All that go d deep go less deep, too, since a row
needs the rows before it. Room is made for N = S: a pass has floor(S s(d)) rows at depth d. Chains are in the order in
which they were drawn, so the length of every chain is known beforehand.

The loss is sum w l / sum w over all pairs and mask rows, with l the token loss and w = exp(-d / position_decay) where
the token is to be learned, lies in the document and the draft vocabulary has the target's likeliest token there. The
shares, their defaults 0.7 and 0.2, and equal weights are those of the speculators library.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.drafts.eagle.p_eagle import PEagle
from eagle_jax.models.target import Target, logit_softcap
from eagle_jax.ops.attention import causal
from eagle_jax.ops.blocks import block_attention
from eagle_jax.ops.spec import PLAIN
from eagle_jax.train.loss import eagle
from eagle_jax.train.loss.objective import examples
from eagle_jax.train.loss.vocabulary import CHUNK, Soft, TokenLoss, vocabulary_loss


class Chains(NamedTuple):
    """The pairs that chains begin at, [B, n], and the weights of all rows, [B, S + M]: those of the pairs first."""

    starts: jax.Array
    weights: jax.Array


class Group(NamedTuple):
    """Chains of one length: the first one's index, the number of chains, and the mask rows of each."""

    first: int
    chains: int
    length: int


def shares(depths: int, retention: float, least: float) -> tuple[float, ...]:
    """Returns the share of the pairs that depths 1, 2, ... learn."""
    return tuple(max(retention**depth, least) for depth in range(1, depths))


def groups(width: int, shares: tuple[float, ...]) -> list[Group]:
    """Divides the chains of a sequence by their length, the longest first.

    Example: 10 positions and shares 0.7, 0.49, 0.343 give 7, 4 and 3 rows, and groups (0, 3, 3), (3, 1, 2), (4, 3, 1).
    """
    rows, found = [math.floor(width * share) for share in shares], []
    for length in range(len(rows), 0, -1):
        first = rows[length] if length < len(rows) else 0
        if rows[length - 1] > first:
            found.append(Group(first, rows[length - 1] - first, length))
    return found


def _by_chain(of_group: Group, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the start and the depth of every mask row of a group, [B, chains * length] and [chains * length]."""
    own = starts[:, of_group.first : of_group.first + of_group.chains]
    depths = jnp.arange(1, of_group.length + 1, dtype=jnp.int32)
    return jnp.repeat(own, of_group.length, axis=1), jnp.tile(depths, of_group.chains)


def rows_of(starts: jax.Array, width: int, of: list[Group]) -> tuple[jax.Array, jax.Array]:
    """Returns the pair [B, S + M] that each row is of, and its depth [1, S + M]: the pairs, then the mask rows."""
    pairs = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (len(starts), width))
    masks = [_by_chain(group, starts) for group in of]
    depths = [jnp.zeros(width, jnp.int32), *(depth for _, depth in masks)]
    return jnp.concatenate([pairs, *(start for start, _ in masks)], axis=1), jnp.concatenate(depths)[None]


def choose_chains(
    made: eagle.Examples, key: jax.Array, shares: tuple[float, ...], decay: float | None = None
) -> Chains:
    """Draws the pairs at which chains begin, and weighs all rows, as the top of this file says."""
    width, of = made.tokens.shape[1], groups(made.tokens.shape[1], shares)
    learned = jnp.pad(made.loss_mask, [(0, 0), (0, len(shares) + 2)])
    known = jnp.pad(made.known, [(0, 0), (0, len(shares) + 1)])
    row = jnp.arange(width, dtype=jnp.int32)[None]
    usable = (learned[:, 2 : width + 2] > 0) & (row + 2 < made.text.end)
    order = jnp.where(usable, jax.random.uniform(key, usable.shape), -1)
    count = sum(group.chains for group in of)
    starts = jax.lax.top_k(order, count)[1].astype(jnp.int32)
    pairs, depths = rows_of(starts, width, of)
    predicted = pairs + 2 + depths
    wanted = jnp.take_along_axis(learned, predicted, axis=1) * jnp.take_along_axis(known, predicted - 1, axis=1)
    inside = predicted < jnp.take_along_axis(made.text.end, pairs, axis=1)
    # Of N usable pairs, floor(N share) go as deep as this row: those that were drawn before the others.
    kept = jnp.floor(usable.sum(axis=1, keepdims=True) * jnp.asarray((1.0, *shares), jnp.float32)[depths])
    drawn = [jnp.repeat(group.first + jnp.arange(group.chains, dtype=jnp.int32), group.length) for group in of]
    rank = jnp.concatenate([jnp.zeros(width, jnp.int32), *drawn])[None]
    falling = 1.0 if decay is None else jnp.exp(-depths / decay)
    return Chains(starts, wanted * inside * (rank < kept) * falling)


@jax.named_scope("p_eagle_loss")
def row_outputs(
    draft: PEagle,
    target: Target,
    made: eagle.Examples,
    starts: jax.Array,
    shares: tuple[float, ...],
    dtype: Any = None,
) -> jax.Array:
    """Runs the head over all pairs and chains; returns what its logits are computed from, [B, S + M, D].

    Args:
      starts: [B, n], the pairs at which chains begin, in the order of `groups`.
      dtype: of the head's computation; None: the head's.
    """
    head, text = eagle.in_dtype(draft, dtype), made.text
    batch, width = made.tokens.shape
    of = groups(width, shares)
    pairs, depths = rows_of(starts, width, of)
    masks = pairs.shape[1] - width
    following = jnp.pad(made.tokens[:, 1:], [(0, 0), (0, 1)])
    unknown = jnp.full((batch, masks), head.config.mask_token_id, following.dtype)
    tokens = jnp.concatenate([following, unknown], axis=1)
    positions = jnp.take_along_axis(text.positions, pairs, axis=1) + depths
    lengths = jnp.take_along_axis(text.end - text.first, pairs, axis=1)
    fused = head.fuse(made.features)
    mask = jnp.broadcast_to(head.fuse(head.mask_hidden[...]), (batch, masks, fused.shape[-1]))
    # A chain sees the pairs before its first row, which stands one position after the pair that it begins at.
    anchors = jnp.minimum(starts + 1, width - 1)

    def attend(index, q, k, v, spec=PLAIN):
        del index
        context = k[:, :, :width], v[:, :, :width]
        mixed, start = [causal(q[:, :width], *context, text, spec)], width
        for group in of:
            rows = slice(start, start + group.chains * group.length)
            own = anchors[:, group.first : group.first + group.chains]
            blocks = q[:, rows], k[:, :, rows], v[:, :, rows]
            mixed.append(block_attention(*blocks, context, own, text, spec, causal=True, limit_own=True))
            start = rows.stop
        return jnp.concatenate(mixed, axis=1), None

    hidden, _ = head(target, jnp.concatenate([fused, mask], axis=1), tokens, positions, attend, prompt_lengths=lengths)
    return head.before_logits(hidden)


@dataclasses.dataclass(frozen=True)
class PEagleObjective:
    """The loss of a P-EAGLE head over all its depths, at sampled positions; see the top of loss/p_eagle.py.

    retention: depth d learns max(retention ** d, least_retention) of the positions.
    position_decay: depth d weighs exp(-d / position_decay); None: all rows weigh the same.
    divergence, token_loss: see `eagle3_loss`.
    dtype, chunk: as in `Eagle3Objective`.
    """

    retention: float = 0.7
    least_retention: float = 0.2
    position_decay: float | None = None
    divergence: str = "cross_entropy"
    dtype: Any = None
    chunk: int = CHUNK
    token_loss: TokenLoss = "cross_entropy"

    def __post_init__(self) -> None:
        eagle.check_token_loss(self.token_loss, self.divergence)

    def prepare(self, model, target, batch):
        return examples(model, target, batch, self.chunk)

    def shares(self, model):
        return shares(model.config.num_depths, self.retention, self.least_retention)

    def draw(self, model, prepared, key):
        return prepared, choose_chains(prepared, key, self.shares(model), self.position_decay)

    def counts(self, prepared):
        return prepared[1].weights.sum()

    def sums(self, model, target, prepared, counts, key):
        del key
        made, (starts, weights) = prepared
        of_depths = self.shares(model)
        x = row_outputs(model, target, made, starts, of_depths, self.dtype)
        width = made.tokens.shape[1]
        pairs, depths = rows_of(starts, width, groups(width, of_depths))
        before = jnp.minimum(pairs + 1 + depths, width - 1)  # the positions whose next token is predicted
        hidden = jnp.take_along_axis(made.answers, before[:, :, None], axis=1)
        rows = target.output_weight()
        rows = jax.lax.stop_gradient(rows if model.target_ids is None else rows[model.target_ids[...]])
        softcap = logit_softcap(target)
        weight = model.output_weight(target)
        with jax.named_scope("p_eagle_loss"):
            sums = vocabulary_loss(
                x.astype(weight.dtype),
                weight,
                Soft(hidden, rows, softcap),
                weights,
                self.chunk,
                self.token_loss,
                softcap if model.lm_head is None else None,
            )
        total = jnp.maximum(counts, 1e-6)
        loss = (sums.loss - sums.entropy if self.divergence == "kl" else sums.loss) / total
        return loss, {"loss": loss, "accuracy": sums.match / total}
