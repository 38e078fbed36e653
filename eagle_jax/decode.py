"""Decoding: prefill, cycle, generate, stream. Plain decoding is the same code with a tree of the root alone.

Letters: B batch, P padded prompt, T tokens of one pass, D tree depth, N nodes, F feature width, V vocabulary.

One cycle (see `cycle`):
    grow     the head drafts a tree from the last committed position
    verify   the target runs the N nodes in one pass under the tree's ancestor mask
    accept   the deepest path that the target agrees with, and the target's own next token (the bonus)
    commit   the accepted keys and values enter the target's cache, the tokens are appended
    extend   the accepted features enter the draft's cache, ready for the next tree

Between cycles a row of length n has n - 1 positions in both caches: its last token, the root of the next tree,
is chosen but not yet run.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from eagle_jax.models.cache import KVCache, take_rows
from eagle_jax.models.config import DraftConfig
from eagle_jax.models.layers import Attend, attention
from eagle_jax.models.llama import Llama, LlamaOutput
from eagle_jax.tree import AcceptFn, DraftStep, Tree, TreeConfig, accept_greedy, grow

# Tokens of a prompt that one pass takes: enough to keep a GPU's or TPU's matrix units busy, few enough that the
# scores of attention stay small beside the cache.
PREFILL_CHUNK = 256

# Rows beyond the capacity: a commit writes D + 1 of them, of which only the accepted count. A deeper tree needs
# `prefill(tree=...)` to know of it.
MIN_SCRATCH = 32

# Cache rows come in whole tiles of the accelerators' matrix products; else XLA pads, that is copies, the cache.
ROW_TILE = 128


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
    """What a draft keeps between cycles: cache of its pairs, and its output at the last one, hidden [B, D]."""

    cache: KVCache
    hidden: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that a cycle needs and returns. Donate it.

    tokens [B, P + max_new_tokens]; lengths [B]: prompt and new tokens so far; limits [B]: where a row ends;
    done, failed [B] bool; cycles [B]; accepted [B, scratch]: cycles that accepted 0, 1, ... draft tokens;
    stop_tokens [any number]; prompt_lengths [B]; cache: the target's; draft: None in plain decoding.
    """

    tokens: jax.Array
    lengths: jax.Array
    limits: jax.Array
    done: jax.Array
    failed: jax.Array
    cycles: jax.Array
    accepted: jax.Array
    stop_tokens: jax.Array
    prompt_lengths: jax.Array
    cache: KVCache
    draft: DraftState | None


def prefill(
    target: Llama,
    draft: Draft | None,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array | None = None,
    *,
    sampling: Any = None,
    max_new_tokens: int = 256,
    stop_tokens: tuple[int, ...] | jax.Array = (),
    capacity: int | None = None,
    tree: TreeConfig | None = None,
) -> DecodeState:
    """Runs the prompts, in chunks, and chooses each row's first new token (the first root).

    Args:
      tokens: [B, P] int32 prompts, right-padded.
      lengths: [B] int32, at least 1.
      capacity: the most tokens (prompt + new) a row may hold; default P + max_new_tokens.
      tree: the deepest tree that `cycle` will be given; needed only beyond a depth of MIN_SCRATCH - 1.
    """
    if sampling is not None and not sampling.greedy:
        raise ValueError(f"sampling: only temperature 0 is implemented, got {sampling.temperature!r}")
    batch, width = tokens.shape
    lengths = lengths.astype(jnp.int32)
    capacity = width + max_new_tokens if capacity is None else capacity
    scratch = MIN_SCRATCH if tree is None else max(MIN_SCRATCH, tree.depth + 1)

    chunks = -(-width // PREFILL_CHUNK)
    chunk = -(-width // chunks)
    padded = jnp.pad(tokens, [(0, 0), (0, chunks * chunk + 1 - width)])
    rows = -(-max(capacity + scratch, chunks * chunk) // ROW_TILE) * ROW_TILE
    last = jnp.clip(lengths - 1, 0, width - 1)  # position of each row's last prompt token

    cache = KVCache.zeros(target.config, batch, rows, target.dtype)
    hidden = jnp.zeros((batch, target.config.hidden_size), target.dtype)
    draft_cache = feature = None
    if draft is not None:
        draft_cache = KVCache.zeros(draft.config, batch, rows, draft.dtype)
        feature = jnp.zeros((batch, draft.feature_size(target)), target.dtype)

    def run_chunk(carry, start):
        cache, draft_cache, hidden, feature = carry
        ids = jax.lax.dynamic_slice_in_dim(padded, start, chunk + 1, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(chunk), (batch, chunk))
        mask = jnp.broadcast_to(jnp.tri(chunk, dtype=bool), (batch, chunk, chunk))
        before = jnp.full(batch, start, jnp.int32)
        out = target(
            ids[:, :-1],
            positions,
            mask,
            prompt_lengths=lengths,
            cache=cache.with_length(before),
            taps=() if draft is None else draft.taps(target),
            in_blocks=True,
        )
        cache = cache.write(out.rows, start)
        ends_here = (last >= start) & (last < start + chunk)
        offset = jnp.clip(last - start, 0, chunk - 1)

        def keep(old, new):  # the last position's vector, from the chunk that holds it
            return jnp.where(ends_here[:, None], _at(new, offset), old)

        hidden = keep(hidden, out.hidden)
        if draft is not None:
            # Pair i is (feature i, token i + 1). The pair of the last feature waits for its token, the first root.
            features = draft.features(out)
            feature = keep(feature, features)
            attend = _attend_cached(draft_cache.with_length(before), mask, in_blocks=True)
            _, kept = draft(target, draft.fuse(features), ids[:, 1:], positions, attend, prompt_lengths=lengths)
            draft_cache = draft_cache.write([kept], start)
        return (cache, draft_cache, hidden, feature), None

    carry = (cache, draft_cache, hidden, feature)
    carry, _ = jax.lax.scan(run_chunk, carry, jnp.arange(chunks, dtype=jnp.int32) * chunk)
    cache, draft_cache, hidden, feature = carry

    logits = target.logits(hidden[:, None])
    acceptance = accept_greedy(Tree.root(jnp.zeros(batch, jnp.int32)), logits)
    state = DecodeState(
        tokens=jnp.pad(tokens, [(0, 0), (0, max_new_tokens)])
        * (jnp.arange(width + max_new_tokens)[None] < lengths[:, None]),
        lengths=lengths,
        limits=jnp.minimum(lengths + max_new_tokens, capacity),
        done=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
        cycles=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros((batch, scratch), jnp.int32),
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        prompt_lengths=lengths,
        cache=cache.with_length(lengths),
        draft=None,
    )
    # A row without a prompt, or with one that does not fit, can choose nothing.
    valid = (lengths >= 1) & (lengths <= min(width, capacity - 1))
    state = dataclasses.replace(state, failed=~valid, done=~valid)
    state = _append(state, acceptance.bonus[:, None], jnp.ones(batch, jnp.int32), _leading(_finite(logits)))
    if draft is not None and draft_cache is not None and feature is not None:
        root = _at(state.tokens, state.lengths - 1)[:, None]
        past = draft_cache.with_length(last)
        extended = _extend(draft, target, past, feature[:, None], root, jnp.ones_like(last), lengths)
        state = dataclasses.replace(state, draft=extended)
    return state


def cycle(
    target: Llama,
    draft: Draft | None,
    state: DecodeState,
    *,
    tree: TreeConfig = TreeConfig(),
    accept_fn: AcceptFn | None = None,
) -> DecodeState:
    """One speculative step for every row: 1 to tree.depth + 1 new tokens each. Rows that are done do not change.

    With draft=None one plain decoding step; `tree` is then ignored.

    Args:
      state: from `prefill` or an earlier `cycle`; jit this function and donate it.
      accept_fn: the acceptance rule (see tree/verify.py for its contract); default greedy.
    """
    depth = 0 if draft is None else tree.depth
    if depth + 1 > state.accepted.shape[1]:
        raise ValueError(
            f"tree.depth = {depth} exceeds the {state.accepted.shape[1] - 1} this state has room for; "
            "pass tree= to prefill"
        )
    root = _at(state.tokens, state.lengths - 1)
    nodes = Tree.root(root) if draft is None else draft_tree(target, draft, state, tree)

    out = target(
        nodes.tokens,
        (state.lengths - 1)[:, None] + nodes.depths,
        nodes.ancestors(),
        prompt_lengths=state.prompt_lengths,
        cache=state.cache,
        taps=() if draft is None else draft.taps(target),
    )
    logits = target.logits(out.hidden)
    acceptance = accept_greedy(nodes, logits) if accept_fn is None else accept_fn(nodes, logits, None)

    path = jnp.maximum(acceptance.path[:, : depth + 1], 0)  # padded with the root: a valid row, masked by length
    drafted = jnp.take_along_axis(nodes.tokens, path, axis=1)[:, 1:]
    new = jnp.concatenate([drafted, jnp.zeros_like(root)[:, None]], axis=1)  # [B, D + 1]
    new = jnp.where(jnp.arange(depth + 1)[None] == acceptance.length[:, None], acceptance.bonus[:, None], new)
    # A token is only as good as the logits it was chosen from.
    chosen_well = jnp.take_along_axis(_finite(logits), path, axis=1)
    before = state.lengths
    state = dataclasses.replace(
        state,
        cache=state.cache.write(take_rows(out.rows, path), before - 1),
        cycles=state.cycles + ~state.done,
        accepted=state.accepted
        + jnp.where(state.done, 0, 1)[:, None]
        * jax.nn.one_hot(acceptance.length, state.accepted.shape[1], dtype=jnp.int32),
    )
    state = _append(state, new, acceptance.length + 1, _leading(chosen_well))
    if draft is None:
        return state
    features = jnp.take_along_axis(draft.features(out), path[:, :, None], axis=1)
    count = state.lengths - before
    past = _draft_state(state)
    extended = _extend(draft, target, past.cache, features, new, count, state.prompt_lengths)
    hidden = jnp.where((count > 0)[:, None], extended.hidden, past.hidden)
    return dataclasses.replace(state, draft=dataclasses.replace(extended, hidden=hidden))


def _append(state: DecodeState, new: jax.Array, count: jax.Array, well: jax.Array) -> DecodeState:
    """Appends the first `count` [B] of the tokens new [B, T], up to a stop token, the limit, or broken logits.

    Args:
      well: [B] how many of the new tokens come from finite logits.
    """
    index = jnp.arange(new.shape[1])[None]
    stops = jnp.any(new[:, :, None] == state.stop_tokens[None, None], axis=-1)
    first_stop = jnp.argmax(stops, axis=1)
    until_stop = jnp.where(stops.any(1), first_stop + 1, new.shape[1])
    wanted = jnp.minimum(jnp.minimum(count, until_stop), state.limits - state.lengths)
    taken = jnp.where(state.done, 0, jnp.minimum(wanted, well))
    lengths = state.lengths + taken
    stopped = jnp.any(stops & (index < taken[:, None]), axis=1)
    failed = ~state.done & (well < wanted)

    # tokens[b, lengths[b] + i] = new[b, i] for i < taken[b], as one elementwise pass.
    offset = jnp.arange(state.tokens.shape[1])[None] - state.lengths[:, None]
    placed = jnp.take_along_axis(new, jnp.clip(offset, 0, new.shape[1] - 1), axis=1)
    return dataclasses.replace(
        state,
        tokens=jnp.where((offset >= 0) & (offset < taken[:, None]), placed, state.tokens),
        lengths=lengths,
        cache=state.cache.with_length(lengths - 1),
        done=state.done | stopped | failed | (lengths >= state.limits),
        failed=state.failed | failed,
    )


def draft_tree(target: Llama, draft: Draft, state: DecodeState, config: TreeConfig) -> Tree:
    """The draft tree under each row's root, its last token."""
    past = _draft_state(state)
    root = _at(state.tokens, state.lengths - 1)
    batch, k = root.shape[0], config.top_k
    scratch_shape = (batch, draft.config.num_kv_heads, (config.depth - 1) * k, draft.config.head_dim)
    scratch = jnp.zeros(scratch_shape, draft.dtype)

    def draft_fn(carry, step: DraftStep):
        hidden, scratch_k, scratch_v = carry  # hidden [B, k, D]: outputs of the previous step's nodes

        def attend(q, k, v):
            start = (0, 0, step.level * config.top_k, 0)
            rows = jax.lax.dynamic_update_slice(scratch_k, k, start), jax.lax.dynamic_update_slice(scratch_v, v, start)
            return attention(q, *rows, step.mask, past.cache.layer(0)), rows

        hidden = jnp.take_along_axis(hidden, step.parents[:, :, None], axis=1)
        positions = jnp.broadcast_to((past.cache.length + step.level)[:, None], step.tokens.shape)
        hidden, rows = draft(target, hidden, step.tokens, positions, attend, prompt_lengths=state.prompt_lengths)
        return draft.logits(target, hidden), (hidden, *rows)

    first = jnp.broadcast_to(past.hidden[:, None], (batch, k, past.hidden.shape[-1]))
    logits = draft.logits(target, past.hidden)
    return grow(root, logits, (first, scratch, scratch), draft_fn, config, _target_ids(draft))


def _extend(
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
    attend = _attend_cached(past, mask)
    hidden, kept = draft(target, draft.fuse(features), tokens, positions, attend, prompt_lengths=prompt_lengths)
    cache = past.write([kept], past.length).with_length(past.length + count)
    return DraftState(cache, _at(hidden, jnp.maximum(count - 1, 0)))


def _draft_state(state: DecodeState) -> DraftState:
    if state.draft is None:
        raise ValueError("the state was prefilled without a draft; pass the draft to prefill too")
    return state.draft


def _attend_cached(cache: KVCache, mask: jax.Array, in_blocks: bool = False) -> Attend:
    """Attention of a one-layer draft over its cache and the new rows, which it keeps."""

    def attend(q, k, v):
        return attention(q, k, v, mask, cache.layer(0), in_blocks=in_blocks), (k, v)

    return attend


def _target_ids(draft: Draft) -> jax.Array | None:
    return None if draft.target_ids is None else draft.target_ids[...]


def _finite(logits: jax.Array) -> jax.Array:
    """[B, N, V] -> [B, N]: no NaN and no infinity among a node's logits."""
    return jnp.isfinite(logits).all(axis=-1)


def _leading(flags: jax.Array) -> jax.Array:
    """[B, T] bool -> [B]: how many are True before the first False."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=1).sum(axis=1)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [B, T, ...] at index [B] -> [B, ...]."""
    return jax.vmap(lambda row, i: row[i])(values, index)
