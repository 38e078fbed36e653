"""The public functions: generate, stream, propose, forward, draft_forward.

Letters: B batch, P padded prompt, D tree depth, V vocabulary, Vd draft vocabulary, T tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.decode import DecodeState, Draft, cycle, draft_tree, prefill
from eagle_jax.models.config import tap_layers
from eagle_jax.models.layers import attention
from eagle_jax.models.llama import Llama
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import Tree, TreeConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The result of `generate`.

    tokens: [B, P + max_new_tokens] int32: each row its prompt, directly followed by its new tokens, then zeros.
    lengths: [B] int32, prompt and new tokens; a stop token counts.
    cycles: [B] int32, target passes after the prefill.
    accepted: [B, D + 1] int32, how many cycles accepted 0..D draft tokens, before truncation; sums to `cycles`.
    failed: [B] bool, NaN or infinite logits ended the row.
    """

    tokens: jax.Array
    lengths: jax.Array
    cycles: jax.Array
    accepted: jax.Array
    failed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of a stream: row b's are tokens[b, :counts[b]]. tokens [B, T], counts [B], done [B] bool."""

    tokens: jax.Array
    counts: jax.Array
    done: jax.Array


def generate(
    target: Llama,
    draft: Draft | None,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array | None = None,
    *,
    tree: TreeConfig = TreeConfig(),
    sampling: SamplingConfig = SamplingConfig(),
    max_new_tokens: int = 256,
    stop_tokens: tuple[int, ...] = (),
    capacity: int | None = None,
) -> Output:
    """Continues every prompt; the whole generation is one program without host round trips.

    Args:
      target: the model whose text this is.
      draft: an EAGLE head, or None for plain decoding (`tree` is then ignored). Both give the same tokens.
      tokens: [B, P] int32 prompts, right-padded.
      lengths: [B] int32, 1 to P.
      key: unused by greedy decoding.
      max_new_tokens: most new tokens a row.
      stop_tokens: token ids that end a row; the stop token is kept.
      capacity: most tokens (prompt + new) a row may hold, default P + max_new_tokens.
    Returns:
      Output. A row's result depends on that row alone, not on its neighbours.
    Raises:
      ValueError: for arguments that cannot be; values inside a caller's `jit` cannot be checked there, and a row
        of impossible length comes back as `failed`.
    """
    tokens, lengths = check_arguments(
        target, draft, tokens, lengths, sampling, max_new_tokens, stop_tokens, capacity, tree
    )
    return _generate(
        target,
        draft,
        tokens,
        lengths,
        tree=None if draft is None else tree,
        max_new_tokens=max_new_tokens,
        stop_tokens=jnp.array(stop_tokens, jnp.int32),
        capacity=capacity,
    )


@functools.partial(jax.jit, static_argnames=("tree", "max_new_tokens", "capacity"))
def _generate(target, draft, tokens, lengths, *, tree, **static) -> Output:
    state = prefill(target, draft, tokens, lengths, tree=tree, **static)
    state = jax.lax.while_loop(
        lambda state: ~state.done.all(), lambda state: cycle(target, draft, state, tree=tree), state
    )
    depth = 0 if tree is None else tree.depth
    return Output(state.tokens, state.lengths, state.cycles, state.accepted[:, : depth + 1], state.failed)


def stream(
    target: Llama,
    draft: Draft | None,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array | None = None,
    *,
    tree: TreeConfig = TreeConfig(),
    sampling: SamplingConfig = SamplingConfig(),
    max_new_tokens: int = 256,
    stop_tokens: tuple[int, ...] = (),
    capacity: int | None = None,
    cycles_per_chunk: int = 4,
) -> Iterator[Chunk]:
    """Yields the tokens of `generate` as they come. The first chunk holds each row's first new token.

    Args:
      cycles_per_chunk: cycles run on the device between two chunks; 1 shows the tokens of each cycle, more spend
        less time between host and device. Other arguments as in `generate`.
    """
    tokens, lengths = check_arguments(
        target, draft, tokens, lengths, sampling, max_new_tokens, stop_tokens, capacity, tree
    )
    config = None if draft is None else tree
    state, chunk = _start(
        target,
        draft,
        tokens,
        lengths,
        tree=config,
        max_new_tokens=max_new_tokens,
        stop_tokens=jnp.array(stop_tokens, jnp.int32),
        capacity=capacity,
    )
    yield chunk
    while not jax.device_get(chunk.done).all():
        state, chunk = _advance(target, draft, state, tree=config, cycles=cycles_per_chunk)
        yield chunk


@functools.partial(jax.jit, static_argnames=("tree", "max_new_tokens", "capacity"))
def _start(target, draft, tokens, lengths, **static) -> tuple[DecodeState, Chunk]:
    state = prefill(target, draft, tokens, lengths, **static)
    return state, _chunk(state, lengths, 1)


@functools.partial(jax.jit, static_argnames=("tree", "cycles"), donate_argnames="state")
def _advance(target, draft, state, *, tree, cycles) -> tuple[DecodeState, Chunk]:
    before = state.lengths
    _, state = jax.lax.while_loop(
        lambda carry: (carry[0] < cycles) & ~carry[1].done.all(),
        lambda carry: (carry[0] + 1, cycle(target, draft, carry[1], tree=tree)),
        (0, state),
    )
    return state, _chunk(state, before, cycles * (1 if tree is None else tree.depth + 1))


def _chunk(state: DecodeState, before: jax.Array, width: int) -> Chunk:
    """The tokens that rows gained since they had `before` [B] of them, at most `width` each."""
    counts = state.lengths - before
    index = jnp.arange(width)[None]
    places = jnp.minimum(before[:, None] + index, state.tokens.shape[1] - 1)
    new = jnp.take_along_axis(state.tokens, places, axis=1)
    return Chunk(jnp.where(index < counts[:, None], new, 0), counts, state.done)


@functools.partial(jax.jit, static_argnames="tree")
def propose(
    target: Llama, draft: Draft, tokens: jax.Array, lengths: jax.Array, *, tree: TreeConfig = TreeConfig()
) -> Tree:
    """The first draft tree after each prompt; its root is the target's own next token.

    Args:
      tokens, lengths: as in `generate`.
    Returns:
      Tree of [B, tree.num_nodes] fields.
    """
    state = prefill(target, draft, tokens, lengths, max_new_tokens=1)
    return draft_tree(target, draft, state, tree)


@jax.jit
def forward(
    target: Llama, tokens: jax.Array, lengths: jax.Array, draft: Draft | None = None
) -> tuple[jax.Array, jax.Array]:
    """One causal pass of the target over whole prompts.

    Args:
      tokens, lengths: as in `generate`; values past a row's length mean nothing.
      draft: whose features to return; None stands for an EAGLE-3 head with the official taps.
    Returns:
      logits [B, P, V] float32, and features: [B, P, 3 * D] taps (EAGLE-3) or [B, P, D] after the final norm.
    """
    positions, mask = _causal(tokens)
    taps = tap_layers(None, target.config.num_layers) if draft is None else draft.taps(target)
    out = target(tokens, positions, mask, prompt_lengths=lengths, taps=taps)
    features = out.taps if draft is None else draft.features(out)
    assert features is not None
    return target.logits(out.hidden), features


@jax.jit
def draft_forward(
    draft: Draft, target: Llama, features: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One causal pass of the draft over pairs: features [B, P, F] with the tokens [B, P] that follow them.

    Returns:
      hidden [B, P, D], before the head's final norm, and draft logits [B, P, Vd] float32.
    """
    positions, mask = _causal(tokens)
    hidden, _ = draft(
        target,
        draft.fuse(features),
        tokens,
        positions,
        lambda q, k, v: (attention(q, k, v, mask), None),
        prompt_lengths=lengths,
    )
    return hidden, draft.logits(target, hidden)


def _causal(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    return positions, jnp.broadcast_to(jnp.tri(width, dtype=bool), (batch, width, width))


def check_arguments(
    target: Llama,
    draft: Draft | None,
    tokens: Any,
    lengths: Any,
    sampling: SamplingConfig,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    capacity: int | None,
    tree: TreeConfig,
) -> tuple[jax.Array, jax.Array]:
    """tokens and lengths as int32 arrays. Raises ValueError naming the argument, its value and the allowed range."""
    vocab = target.config.vocab_size
    if not sampling.greedy:
        raise ValueError(f"sampling: only temperature 0 is implemented, got {sampling.temperature!r}")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
    if capacity is not None and (type(capacity) is not int or capacity < 2):
        raise ValueError(f"capacity must be an integer of at least 2 (a prompt token and a new one), got {capacity!r}")
    for stop in stop_tokens:
        if not 0 <= stop < vocab:
            raise ValueError(f"stop token {stop} is outside the vocabulary, 0 to {vocab - 1}")
    if draft is not None:
        draft.check_fits(target)
        if not isinstance(tree, TreeConfig):
            raise ValueError(f"tree must be a TreeConfig, got {tree!r}")
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")
    if tokens.ndim != 2 or 0 in tokens.shape or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"tokens must be [B, P] and lengths [B], got {tokens.shape} and {lengths.shape}")
    if not isinstance(lengths, jax.core.Tracer):
        longest = tokens.shape[1] if capacity is None else min(tokens.shape[1], capacity - 1)
        for row, length in enumerate(jax.device_get(lengths)):
            if not 1 <= length <= longest:
                limits = f"tokens have {tokens.shape[1]} columns, capacity is {capacity}"
                raise ValueError(f"lengths[{row}] = {length} is outside 1 to {longest} ({limits})")
        if not isinstance(tokens, jax.core.Tracer):
            values, counts = jax.device_get((tokens, lengths))
            used = np.arange(tokens.shape[1]) < counts[:, None]
            bad = np.argwhere(used & ((values < 0) | (values >= vocab)))
            if len(bad):
                row, column = bad[0]
                raise ValueError(f"tokens[{row}, {column}] = {values[row, column]} is outside 0 to {vocab - 1}")
    return tokens.astype(jnp.int32), lengths.astype(jnp.int32)
