"""Growing draft trees: EAGLE-2's context-aware dynamic tree (arXiv 2406.16858, section 4).

Letters: B batch, k = top_k, V draft vocabulary, C candidates, N nodes, M = (depth - 1) * k scratch rows.

The draft comes in as a function, so that toy drafts can test this file:

    draft_fn(carry, step) -> (logits [B, k, V], carry)

It scores the children of the k nodes in `step`. `carry` is the draft's own (its keys and values, say).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.tree.tree import NO_PARENT, Tree, TreeConfig


class DraftStep(NamedTuple):
    """The k nodes that one drafting step expands.

    tokens: [B, k] target token ids.
    parents: [B, k] which node of the previous step is the parent (0 at the first step).
    mask: [B, k, M]: the nodes of every step in the order drafted (node j of step i is row i * k + j), True for
      those a node may attend to: its ancestors and itself.
    level: [] int32, 0 for the children of the root; these nodes stand `level` positions past the first.
    """

    tokens: jax.Array
    parents: jax.Array
    mask: jax.Array
    level: jax.Array


DraftFn = Callable[[Any, DraftStep], tuple[jax.Array, Any]]


def grow(
    root: jax.Array,
    logits: jax.Array,
    carry: Any,
    draft_fn: DraftFn,
    config: TreeConfig,
    target_ids: jax.Array | None = None,
) -> Tree:
    """Grows a tree level by level and keeps its best nodes.

    Each level proposes top_k children for each of its top_k nodes and expands the best top_k of those by
    cumulative log-probability. Of all proposals the best num_nodes - 1 are kept, in the order proposed. Equal
    scores go to the lower index; a child comes after its parent and never scores more, so no node is kept
    without its parent.

    Args:
      root: [B] target token ids.
      logits: [B, V], the draft's logits for the children of the root.
      carry: handed to the first `draft_fn` call.
      target_ids: [V] target id of every draft id; None where they are the same.
    Raises:
      ValueError: if top_k exceeds the draft vocabulary.
    """
    batch, vocab = logits.shape
    k = config.top_k
    if k > vocab:
        raise ValueError(f"TreeConfig.top_k = {k} exceeds the draft vocabulary of {vocab} tokens")
    levels = config.depth - 1  # expansions after the root's

    def propose(logits, scores):  # [B, W, V], [B, W] -> cumulative scores and target tokens [B, W * k]
        log_probs, ids = jax.lax.top_k(log_probabilities(logits), k)
        tokens = ids if target_ids is None else target_ids[ids]
        return (scores[:, :, None] + log_probs).reshape(batch, -1), tokens.reshape(batch, -1)

    def expand(state, level):
        carry, beam, tokens, scores, mask = state
        # Row j keeps its parent's ancestors and adds itself: [B, k, M].
        parents = jnp.where(level == 0, 0, beam // k)
        own = jax.nn.one_hot(level * k + jnp.arange(k), levels * k, dtype=bool)
        mask = jnp.take_along_axis(mask, parents[:, :, None], axis=1) | own[None]
        logits, carry = draft_fn(carry, DraftStep(tokens, parents, mask, level))
        all_scores, all_tokens = propose(logits, scores)
        scores, best = jax.lax.top_k(all_scores, k)
        tokens = jnp.take_along_axis(all_tokens, best, axis=1)
        return (carry, best, tokens, scores, mask), (all_scores, all_tokens, beam)

    scores, tokens = propose(logits[:, None], jnp.zeros((batch, 1), jnp.float32))
    if levels == 0:
        return _select(root, scores, tokens, jnp.zeros((0, batch, k), jnp.int32), config)
    first = jnp.broadcast_to(jnp.arange(k), (batch, k))
    mask = jnp.zeros((batch, k, levels * k), bool)
    state = (carry, first, tokens, scores, mask)
    # beams[i]: which candidates of the level before were expanded at level i. [levels, B, k]
    _, (more_scores, more_tokens, beams) = jax.lax.scan(expand, state, jnp.arange(levels))

    all_scores = jnp.concatenate([scores, _flat(more_scores)], axis=1)  # [B, C], in flat candidate order
    all_tokens = jnp.concatenate([tokens, _flat(more_tokens)], axis=1)
    return _select(root, all_scores, all_tokens, beams, config)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """Log-softmax over the last axis in float32; NaN becomes -inf, so that a broken draft still makes a tree."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(log_probs <= 0, log_probs, -jnp.inf)


def _flat(levels: jax.Array) -> jax.Array:
    """[levels, B, k * k] -> [B, levels * k * k]."""
    return jnp.moveaxis(levels, 0, 1).reshape(levels.shape[1], -1)


def _select(root, scores, tokens, beams, config: TreeConfig) -> Tree:
    """The best num_nodes - 1 candidates as a tree. scores, tokens [B, C]; beams [levels, B, k]."""
    batch, k = root.shape[0], config.top_k
    best_scores, flat = jax.lax.top_k(scores, config.num_nodes - 1)
    flat, best_scores = jax.lax.sort((flat, best_scores), dimension=1, num_keys=1)

    # Flat candidate ids, for top_k = 2: [0 1 | 2 3  4 5 | 6 7  8 9 | ...]: the root's two children, then two for
    # each of the two beams a level. Block b = flat // k has one parent: block 0 the root, block 1 + i * k + j beam
    # j of level i, which is candidate beams[i, j] of the level before, whose first flat id is starts[i].
    block_parents = jnp.moveaxis(beams, 0, 1) + _level_starts(config)[None, :, None]
    block_parents = jnp.pad(block_parents.reshape(batch, -1), [(0, 0), (1, 0)], constant_values=-1)
    parent_flat = jnp.take_along_axis(block_parents, flat // k, axis=1)
    # A kept candidate's node is 1 + the number of kept candidates with a lower flat id.
    lower = flat[:, None, :] < parent_flat[:, :, None]
    parents = jnp.where(parent_flat < 0, 0, 1 + lower.sum(-1, dtype=jnp.int32))
    depths = jnp.where(flat < k, 1, 2 + (flat - k) // k**2)

    def with_root(first, rest):
        return jnp.concatenate([jnp.broadcast_to(first, (batch,))[:, None], rest], axis=1)

    return Tree(
        tokens=with_root(root, jnp.take_along_axis(tokens, flat, axis=1)).astype(jnp.int32),
        parents=with_root(jnp.int32(NO_PARENT), parents.astype(jnp.int32)),
        depths=with_root(jnp.int32(0), depths.astype(jnp.int32)),
        scores=with_root(jnp.float32(0), best_scores),
    )


def _level_starts(config: TreeConfig) -> jax.Array:
    """First flat id of the level that the beams of expansion i were chosen from: [0, k, k + k^2, ...]."""
    k = config.top_k
    return jnp.array([0 if i == 0 else k + (i - 1) * k**2 for i in range(config.depth - 1)], jnp.int32)
