"""Prompts of a new batch: pad converts token lists to arrays, prefill runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32, Key

from eagle_jax.decode.accept import accept
from eagle_jax.decode.commit import commit, newly_committed, update
from eagle_jax.decode.plan import PREFILL_CHUNK, Plan, padded_width, plan
from eagle_jax.decode.state import DecodeState, check_capacity, context_of, empty_state, map_rows
from eagle_jax.drafts.none import as_draft
from eagle_jax.drafts.protocol import Committed, Draft, Proposal
from eagle_jax.keys import row_keys
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.ops.arrays import take_one
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN
from eagle_jax.sampling import SamplingConfig
from eagle_jax.sharding import constrain
from eagle_jax.tree import Tree, TreePolicy

# Widths that prompts are padded to. Every width compiles a program.
BUCKETS = tuple(2**n for n in range(5, 18))  # 32 to 131072


def pad(
    prompts: Sequence[Sequence[int]], buckets: Sequence[int] = BUCKETS
) -> tuple[Int32[Array, "batch prompt"], Int32[Array, " batch"]]:
    """Converts lists of token ids to right-padded tokens and lengths on the device.

    Args:
      buckets: widths; the smallest that holds the longest prompt is used.
    Raises:
      ValueError: for an empty prompt, or one longer than the widest bucket.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("a prompt is empty: it needs at least one token")
    tokens = np.zeros((len(prompts), padded_width(max(lengths), buckets)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def prefill(
    target: Target,
    draft: Draft | None,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[ArrayLike, " batch"],
    key: Key[Array, ""] | Key[Array, " batch"] | None = None,
    *,
    sampling: SamplingConfig = SamplingConfig(),
    max_new_tokens: int = 256,
    stop_tokens: tuple[int | Int[Array, ""], ...] | Int[ArrayLike, " stops"] = (),
    capacity: int | None = None,
    tree: TreePolicy | None = None,
    num_samples: int = 1,
    log_probs: bool = False,
    chunk: int = PREFILL_CHUNK,
) -> DecodeState:
    """Runs the prompts in chunks, and chooses the first new token (the first root) of each.

    Args:
      tokens: prompts, right-padded.
      lengths: at least 1.
      key: one typed key (sequence i uses fold_in(key, i)), or a key a sequence. The token at index n of a sequence is
        drawn with fold_in(its key, n). None if `sampling` is greedy.
      sampling: see `SamplingConfig`; becomes part of the state.
      max_new_tokens: most new tokens of a sequence, limited by `capacity`.
      capacity: most tokens (prompt + new) of a sequence; default the prompts' width + max_new_tokens.
      tree: the deepest tree that `cycle` will get; needed only for depths above MIN_SCRATCH - 1.
      num_samples: sequences per prompt, adjacent in the batch. Sample j of prompt i has the key fold_in(key i, j).
      log_probs: whether to record the log-probabilities of new tokens.
      chunk: most prompt tokens per pass; fewer if the cache of a layer with a window takes fewer at once.
    Returns:
      DecodeState of batch * num_samples sequences.
    """
    batch, width = tokens.shape
    lengths = jnp.array(lengths, jnp.int32)  # a copy, so that donating the state leaves the caller's array
    sizes = plan(width, max_new_tokens, capacity=capacity)
    draft = as_draft(target, draft)
    check_capacity(target, batch * num_samples, sizes.capacity)
    sampling.check(batch, target.config.vocab_size)
    keys = None if sampling.greedy else row_keys(key, batch, num_samples)
    # A sequence with an empty prompt, or one that does not fit, fails.
    valid = (lengths >= 1) & (lengths <= sizes.longest_prompt)
    state = empty_state(
        target,
        draft,
        batch,
        sizes.capacity,
        sampling=sampling,
        stop_tokens=stop_tokens,
        tree=tree,
        log_probs=log_probs,
        width=sizes.columns,
    )
    state = _with_prompts(state, tokens, lengths, valid, sizes)
    chunks = -(-width // chunk)
    state, last = run_prompts(target, draft, state, min(-(-width // chunks), state.cache.most_new))
    if num_samples > 1:
        state = map_rows(lambda x: jnp.repeat(x, num_samples, axis=0), dataclasses.replace(state, keys=None))
        last = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), last)
    return constrain(choose_first(target, draft, dataclasses.replace(state, keys=keys), last), target)


def _with_prompts(
    state: DecodeState,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    valid: Bool[Array, " batch"],
    sizes: Plan,
) -> DecodeState:
    """Returns an empty state with prompts that have yet to run."""
    return dataclasses.replace(
        state,
        tokens=jnp.pad(tokens.astype(jnp.int32), [(0, 0), (0, sizes.max_new_tokens)])
        * (jnp.arange(sizes.columns, dtype=jnp.int32)[None] < lengths[:, None]),
        lengths=lengths,
        limits=sizes.limits(lengths),
        done=~valid,
        failed=~valid,
        prompt_lengths=lengths,
    )


def reusable(target: Target, draft: Draft | None) -> bool:
    """Returns whether `insert(reuse=True)` can reuse the cached keys of a shared prefix.

    Not with dynamic RoPE, where cached keys depend on the length of the prompt that they were computed for.
    """
    return not target.config.rope.by_length and as_draft(target, draft).reusable


@jax.named_scope("prefill")
def run_prompts(
    target: Target, draft: Draft, state: DecodeState, chunk: int
) -> tuple[DecodeState, tuple[Float[Array, "batch hidden"], Float[Array, "batch features"] | None]]:
    """Runs every sequence's tokens from its cache's length on, `chunk` of them per pass.

    Returns:
      The state with target cache and draft memory filled, and the target's output at each sequence's last token: its
      hidden state, and its taps if the draft reads any.
    """
    batch = state.tokens.shape[0]
    start, last = state.cache.length, state.lengths - 1
    if not reusable(target, draft):
        start = jnp.zeros_like(start)
    causal = jnp.broadcast_to(jnp.tri(chunk, dtype=bool), (batch, chunk, chunk))
    taps = draft.taps(target)

    def run_chunk(index, carry):
        cache, memory, at_last = carry
        # The last chunk may overlap positions that are cached already; they are rewritten with equal values.
        begin = jnp.clip(start + index * chunk, 0, state.positions - chunk)
        positions = begin[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]

        past = cache.with_length(begin)

        def attend(index, q, k, v, spec=PLAIN):
            # Write the new positions first, then attend below `begin`. Reading first lets XLA schedule the write early
            # and copy the cache. Rings take no padding far past the end of a text.
            old = past.write_layer(index, k, v, begin, state.lengths)
            return attention(q, k, v, causal, old, spec=spec, positions=positions, in_blocks=True), (old.k, old.v)

        tokens = _tokens_at(state, positions)
        out, written = target.run(tokens, positions, attend, prompt_lengths=state.prompt_lengths, taps=taps)
        cache = dataclasses.replace(cache, k=[k for k, _ in written], v=[v for _, v in written])
        ends_here = (last >= begin) & (last < begin + chunk)
        offset = jnp.clip(last - begin, 0, chunk - 1)
        # The output at the last token, from the chunk that contains it.
        at_last = jax.tree.map(
            lambda old, new: jnp.where(ends_here[:, None], take_one(new, offset), old), at_last, (out.hidden, out.taps)
        )
        # The last position is committed later, once its next token (the first root) is chosen.
        committed = Committed(
            tokens=tokens,
            next_tokens=_tokens_at(state, positions + 1),
            start=begin,
            count=jnp.clip(last - begin, 0, chunk),
            output=out,
            prompt_lengths=state.prompt_lengths,
        )
        return cache, draft.update(target, memory, committed), at_last

    chunks = jnp.max(-(-(state.lengths - start) // chunk))
    at_last = (
        jnp.zeros((batch, target.config.hidden_size), target.dtype),
        jnp.zeros((batch, len(taps) * target.config.hidden_size), target.dtype) if taps else None,
    )
    carry = (state.cache, state.memory, at_last)
    cache, memory, at_last = jax.lax.fori_loop(0, chunks, run_chunk, carry)
    return dataclasses.replace(state, cache=cache.with_length(state.lengths), memory=memory), at_last


def _tokens_at(state: DecodeState, positions: Int[Array, "batch new"]) -> Int[Array, "batch new"]:
    """Gathers the tokens at these positions, clamped to the buffer."""
    return jnp.take_along_axis(state.tokens, jnp.clip(positions, 0, state.tokens.shape[1] - 1), axis=1)


def choose_first(
    target: Target,
    draft: Draft,
    state: DecodeState,
    at_last: tuple[Float[Array, "batch hidden"], Float[Array, "batch features"] | None],
) -> DecodeState:
    """Chooses and commits each sequence's first new token, as a cycle does for a tree of the root alone."""
    hidden, taps = at_last
    context = context_of(state, target.config.vocab_size)
    root = Tree.root(context.root)
    logits = target.logits(hidden[:, None])
    chosen = accept(context, Proposal(root), logits, log_probs=state.log_probs is not None)
    after = commit(state, chosen)
    output = TargetOutput(hidden[:, None], None if taps is None else taps[:, None])
    count = after.lengths - state.lengths
    committed = newly_committed(state, root, output, None, chosen.path, chosen.tokens, count)
    return update(target, draft, after, committed)
