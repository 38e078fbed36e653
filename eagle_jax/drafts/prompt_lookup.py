"""PromptLookup: drafts the tokens that followed an earlier occurrence of the last n-gram.

Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.drafts.protocol import Context, Draft, Proposal
from eagle_jax.models.target import Target
from eagle_jax.ops.arrays import take_one
from eagle_jax.tree import TreePolicy, merge_chains

# Matches considered per branch, as several may have the same continuation.
MATCHES_A_BRANCH = 4


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PromptLookup(Draft):
    """Drafts by copying from the text so far; no weights. For answers that repeat their prompt: code, summaries.

    length: tokens copied, the depth of the tree.
    branches: matches copied from: 1 gives a chain, more a tree.
    ngram: the longest suffix of the text to match. Longer matches are preferred, then later ones.

    A copy that reaches the end of the text wraps around to its start, so that a repeating text is drafted in full.
    """

    length: int = 10
    branches: int = 1
    ngram: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"PromptLookup.{field.name} must be a positive integer, got {value!r}")

    def depth(self, tree: TreePolicy) -> int:
        return self.length

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        count = 1 if self.branches == 1 else MATCHES_A_BRANCH * self.branches
        copies, matched = longest_matches(context, self.length, self.ngram, count)
        copies, valid = _distinct(copies, matched > 0, self.branches)
        root, valid = context.root, jnp.broadcast_to(valid[:, :, None], copies.shape)
        # Without a match, repeat the root: a value that depends on this sequence only.
        return Proposal(merge_chains(root, jnp.where(valid, copies, root[:, None, None]), valid))


def longest_matches(
    context: Context, length: int, ngram: int, count: int
) -> tuple[Int[Array, "batch {count} {length}"], Int[Array, "batch {count}"]]:
    """Returns what followed earlier occurrences of the text's last tokens, and how many tokens each of them matched.

    The longest matches come first, of equally long ones the latest. A match of 0 tokens is none.

    Args:
      length: tokens copied from each.
      ngram: most tokens compared.
      count: matches returned.
    """
    tokens, last = context.tokens, context.root_position
    width = tokens.shape[1]
    places = jnp.arange(width, dtype=jnp.int32)[None]
    # matched[b, j]: length of the common suffix, at most ngram, of the text up to j and of the whole text.
    matched, going_on = jnp.zeros_like(tokens), jnp.ones(tokens.shape, bool)
    for back in range(ngram):
        wanted = take_one(tokens, jnp.maximum(last - back, 0))[:, None]
        going_on &= (jnp.roll(tokens, back, axis=1) == wanted) & (places >= back)
        matched += going_on
    matched = jnp.where(places < last[:, None], matched, 0)
    order = jnp.pad(matched * width + places, [(0, 0), (0, max(count - width, 0))])
    order, matches = jax.lax.top_k(order, count)
    # The continuation of position j: positions j + 1 to the last one, repeated.
    period = jnp.maximum(last[:, None] - matches, 1)
    offsets = jnp.arange(length, dtype=jnp.int32)[None, None] % period[:, :, None]
    copies = jnp.take_along_axis(tokens[:, None], jnp.minimum(matches[:, :, None] + 1 + offsets, width - 1), axis=2)
    return copies, order // width


def _distinct(
    copies: Int[Array, "batch matches length"], valid: Bool[Array, "batch matches"], count: int
) -> tuple[Int[Array, "batch {count} length"], Bool[Array, "batch {count}"]]:
    """Returns the first `count` distinct valid copies, and which of them are valid."""
    rows = copies.shape[1]
    same = (copies[:, :, None] == copies[:, None]).all(axis=-1)  # [batch, matches, matches]
    repeats = (same & jnp.tri(rows, k=-1, dtype=bool)[None] & valid[:, None, :]).any(axis=-1)
    valid = valid & ~repeats
    _, chosen = jax.lax.top_k(jnp.where(valid, rows, 0) - jnp.arange(rows, dtype=jnp.int32)[None], count)
    return jnp.take_along_axis(copies, chosen[:, :, None], axis=1), jnp.take_along_axis(valid, chosen, axis=1)
