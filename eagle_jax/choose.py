"""Choosing tokens: from the target's logits at every node of a tree to the tokens that the text gains.

Letters: B batch, N nodes, D tree depth, W columns of the token buffer, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.keys import token_keys
from eagle_jax.sampling import process
from eagle_jax.state import DecodeState
from eagle_jax.tree import (
    Acceptance,
    AcceptFn,
    Tree,
    accept_coupled,
    accept_greedy,
    accept_sampled,
    choice_noise,
)


class Chosen(NamedTuple):
    """acceptance: its bonus is the last token. path [B, D + 1]: the accepted nodes, padded with the root.

    tokens [B, D + 1]: accepted tokens, then the bonus. finite [B]: how many of these come from finite logits.
    log_probs [B, D + 1]: of the tokens, under the target's own distribution, if the state keeps them.
    """

    acceptance: Acceptance
    path: jax.Array
    tokens: jax.Array
    finite: jax.Array
    log_probs: jax.Array | None


def choose(
    state: DecodeState,
    nodes: Tree,
    logits: jax.Array,
    accept_fn: AcceptFn | None = None,
    noise: jax.Array | None = None,
    depth: int = 0,
    draft_probs: jax.Array | None = None,
) -> Chosen:
    """Applies the acceptance rule to the target's logits [B, N, V].

    Args:
      accept_fn: the caller's rule; by default greedy, `accept_sampled` or `accept_coupled`, as the state says.
      noise: [B, D + 1, V] that the tree was drafted with, if it was.
      draft_probs: [B, N, V] that the tree was drawn from, if it was (see `Proposal`).
    """
    kept = logits
    if state.sampling is not None:
        vocab = logits.shape[-1]
        kept = process(logits, state.sampling, functools.partial(seen_tokens, state, nodes, vocab))
    if accept_fn is not None:
        keys = None if state.keys is None else token_keys(state.keys, state.lengths, 1)[:, 0]
        acceptance = jax.tree.map(lambda x: x.astype(jnp.int32), accept_fn(nodes, kept, keys))
    elif state.sampling is None:
        acceptance = accept_greedy(nodes, kept)
    elif state.sampling.coupled:
        acceptance = accept_coupled(nodes, kept, shared_noise(state, 0, logits.shape[-1]) if noise is None else noise)
    else:
        assert state.keys is not None
        keys = token_keys(state.keys, state.lengths, 1)[:, 0]
        acceptance = accept_sampled(nodes, kept, keys, draft_probs)

    path = jnp.maximum(acceptance.path[:, : depth + 1], 0)  # padded with the root: a valid row, masked by length
    drafted = jnp.take_along_axis(nodes.tokens, path, axis=1)[:, 1:]
    last = jnp.zeros_like(acceptance.bonus)[:, None]
    tokens = jnp.concatenate([drafted, last], axis=1)  # [B, D + 1]
    is_bonus = jnp.arange(depth + 1, dtype=jnp.int32)[None] == acceptance.length[:, None]
    tokens = jnp.where(is_bonus, acceptance.bonus[:, None], tokens)

    # A token is valid if its logits are finite and at least one token is not masked by the bias.
    finite = jnp.isfinite(logits).all(axis=-1)
    if state.sampling is not None:
        finite &= jnp.isfinite(kept.max(axis=-1))
    finite = jnp.take_along_axis(finite, path, axis=1)
    log_probs = None
    if state.log_probs is not None:
        own = jax.nn.log_softmax(jnp.take_along_axis(logits, path[:, :, None], axis=1), axis=-1)
        log_probs = jnp.take_along_axis(own, tokens[:, :, None], axis=2)[:, :, 0]
    return Chosen(acceptance, path, tokens, _leading(finite), log_probs)


def shared_noise(state: DecodeState, depth: int, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, depth + 1, V] for each row's next tokens, for draft and target to share."""
    assert state.keys is not None
    return choice_noise(token_keys(state.keys, state.lengths, depth + 1), vocab_size)


def seen_tokens(state: DecodeState, nodes: Tree, vocab_size: int) -> jax.Array:
    """[B, N, V] bool: the tokens that a node's text holds: the row's own, its ancestors', and itself."""
    batch, count = nodes.tokens.shape
    written = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None] < state.lengths[:, None]
    row, node = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(count, dtype=jnp.int32)[None, :, None]
    in_text = jnp.zeros((batch, vocab_size), bool)
    in_text = in_text.at[row, jnp.where(written, state.tokens, vocab_size)].set(True, mode="drop")
    on_path = jnp.zeros((batch, count, vocab_size), bool)
    ids = jnp.where(nodes.ancestors(), nodes.tokens[:, None, :], vocab_size)  # [B, N, N]
    on_path = on_path.at[row[:, :, None], node, ids].set(True, mode="drop")
    return in_text[:, None] | on_path


def _leading(flags: jax.Array) -> jax.Array:
    """[B, T] bool -> [B]: how many are True before the first False."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
