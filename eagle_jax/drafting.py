"""Drafting: what the decoder asks of a draft head, the tree it grows, and how it learns what was accepted.

Letters: B batch, T new pairs, F feature width, D depth of the tree, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from eagle_jax.models.cache import KVCache
from eagle_jax.models.config import ConfigError, DraftConfig
from eagle_jax.models.layers import Attend, Window, attention
from eagle_jax.models.llama import Llama, LlamaOutput
from eagle_jax.sampling import SamplingConfig, warp
from eagle_jax.state import DecodeState, DraftState, at
from eagle_jax.tree import DraftStep, Tree, TreeConfig, grow


class Draft(Protocol):
    """What the decoder asks of a draft head: Eagle3Draft and Eagle1Draft."""

    config: DraftConfig
    target_ids: Any

    @property
    def dtype(self) -> Any: ...
    def taps(self, target: Llama) -> tuple[int, ...]: ...
    def features(self, output: LlamaOutput) -> jax.Array: ...
    def feature_size(self, target: Llama) -> int: ...
    def check_fits(self, target: Llama) -> None: ...
    def fuse(self, features: jax.Array) -> jax.Array: ...
    def __call__(
        self,
        target: Llama,
        hidden: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        prompt_lengths: jax.Array,
    ) -> tuple[jax.Array, Any]: ...
    def logits(self, target: Llama, hidden: jax.Array) -> jax.Array: ...


AnyDraft = TypeVar("AnyDraft", bound=Draft)


def with_window(draft: AnyDraft, first: int, recent: int) -> AnyDraft:
    """The draft, attending to no more than the text's `first` positions and its `recent` ones.

    Lossless, as any change of a draft is. For texts longer than those the head was trained on, where its acceptance
    falls (the first positions are kept as attention sinks: arXiv 2309.17453).

    Args:
      first: 0 or more. recent: 1 or more, counted back from a position itself.
    """
    if type(first) is not int or type(recent) is not int or first < 0 or recent < 1:
        raise ConfigError(f"a window has first >= 0 and recent >= 1 positions, got first={first!r}, recent={recent!r}")
    limited = copy.copy(draft)
    limited.config = dataclasses.replace(draft.config, window=(first, recent))
    return limited


def draft_tree(
    target: Llama, draft: Draft, state: DecodeState, config: TreeConfig, noise: jax.Array | None = None
) -> Tree:
    """The draft tree under each row's root, its last token.

    Args:
      noise: [B, D + 1, V], as in `accept_coupled`; None drafts the most probable tokens.
    """
    past = draft_state(state)
    root = at(state.tokens, state.lengths - 1)
    batch, k = root.shape[0], config.top_k
    scratch_shape = (batch, draft.config.num_kv_heads, (config.depth - 1) * k, draft.config.head_dim)
    scratch = jnp.zeros(scratch_shape, draft.dtype)
    ids = None if draft.target_ids is None else draft.target_ids[...]

    def logits_of(hidden, depth):  # [B, T, D] -> [B, T, Vd], for the tokens after nodes of a depth
        logits = draft.logits(target, hidden)
        if noise is None or state.sampling is None:
            return logits
        now = jax.lax.dynamic_index_in_dim(noise, depth, axis=1)  # [B, 1, V]
        return _perturbed(logits, state.sampling, now if ids is None else now[:, :, ids])

    def draft_fn(carry, step: DraftStep):
        hidden, scratch_k, scratch_v = carry  # hidden [B, k, D]: outputs of the previous step's nodes
        positions = jnp.broadcast_to((past.cache.length + step.level)[:, None], step.tokens.shape)

        def attend(q, k, v):
            start = (0, 0, step.level * config.top_k, 0)
            rows = jax.lax.dynamic_update_slice(scratch_k, k, start), jax.lax.dynamic_update_slice(scratch_v, v, start)
            return attention(q, *rows, step.mask, past.cache.layer(0), window=window(draft, positions)), rows

        hidden = jnp.take_along_axis(hidden, step.parents[:, :, None], axis=1)
        hidden, rows = draft(target, hidden, step.tokens, positions, attend, prompt_lengths=state.prompt_lengths)
        return logits_of(hidden, step.level + 1), (hidden, *rows)

    first = jnp.broadcast_to(past.hidden[:, None], (batch, k, past.hidden.shape[-1]))
    logits = logits_of(past.hidden[:, None], 0)[:, 0]
    return grow(root, logits, (first, scratch, scratch), draft_fn, config, ids)


def _perturbed(logits: jax.Array, sampling: SamplingConfig, noise: jax.Array) -> jax.Array:
    """Draft logits [B, T, Vd] processed as the target's will be, plus noise [B, 1, Vd]; greedy rows as they are.

    The target's penalties and bias are left out: the draft's guess need not be exact.
    """
    sampled = (sampling.temperature > 0).reshape(-1, 1, 1)
    return jnp.where(sampled, warp(logits, sampling) + noise, logits)


def extend(
    draft: Draft,
    target: Llama,
    past: KVCache,
    features: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    prompt_lengths: jax.Array,
) -> DraftState:
    """Runs the draft over T new pairs, of which the first count [B] are real: features [B, T, F], tokens [B, T]."""
    batch, width = tokens.shape
    mask = jnp.broadcast_to(jnp.tri(width, dtype=bool), (batch, width, width))
    positions = past.length[:, None] + jnp.arange(width)[None]
    attend = attend_cached(past, mask, window(draft, positions))
    hidden, kept = draft(target, draft.fuse(features), tokens, positions, attend, prompt_lengths=prompt_lengths)
    cache = past.write([kept], past.length).with_length(past.length + count)
    return DraftState(cache, at(hidden, jnp.maximum(count - 1, 0)))


def draft_state(state: DecodeState) -> DraftState:
    if state.draft is None:
        raise ValueError("the state was prefilled without a draft; pass the draft to prefill too")
    return state.draft


def window(draft: Draft, positions: jax.Array) -> Window | None:
    """The rows that queries at positions [B, T] may see of the draft's cache, if its config limits them."""
    if draft.config.window is None:
        return None
    first, recent = draft.config.window
    return Window(first, positions - recent + 1)


def attend_cached(cache: KVCache, mask: jax.Array, window: Window | None, in_blocks: bool = False) -> Attend:
    """Attention of a one-layer draft over its cache and the new rows, which it keeps."""

    def attend(q, k, v):
        return attention(q, k, v, mask, cache.layer(0), window=window, in_blocks=in_blocks), (k, v)

    return attend
