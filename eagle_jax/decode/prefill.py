"""Prompts of a new batch: pad makes arrays of them, prefill runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32, Key

from eagle_jax.decode.accept import accept
from eagle_jax.decode.commit import commit, newly_committed, update
from eagle_jax.decode.plan import Plan, padded_width, plan
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

# Tokens of a prompt that one pass takes: enough to keep a GPU's or TPU's matrix units busy, few enough that the
# scores of attention stay small beside the cache.
PREFILL_CHUNK = 256

# Widths that prompts are padded to: a program is compiled for each, so a service compiles at most this many.
BUCKETS = tuple(2**n for n in range(5, 18))  # 32 to 131072


def pad(
    prompts: Sequence[Sequence[int]], buckets: Sequence[int] = BUCKETS
) -> tuple[Int32[Array, "batch prompt"], Int32[Array, " batch"]]:
    """Lists of token ids as tokens, right-padded, and lengths, on the device.

    Args:
      buckets: the widths to choose from: the least that holds the longest prompt.
    Raises:
      ValueError: for an empty prompt, and for one longer than the widest bucket.
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
    stop_tokens: tuple[int, ...] | Int[ArrayLike, " stops"] = (),
    capacity: int | None = None,
    tree: TreePolicy | None = None,
    num_samples: int = 1,
    log_probs: bool = False,
    chunk: int = PREFILL_CHUNK,
) -> DecodeState:
    """Runs the prompts, in chunks, and chooses each row's first new token (the first root).

    Args:
      tokens: prompts, right-padded.
      lengths: at least 1.
      key: one typed key (sequence i uses fold_in(key, i)), or one a row. The token at index n of a sequence is
        drawn with fold_in(its key, n). None where `sampling` is greedy.
      sampling: see `SamplingConfig`; kept in the state.
      max_new_tokens: most new tokens a row; more than `capacity` mean as many as fit.
      capacity: the most tokens (prompt + new) a row may hold; default the prompts' width + max_new_tokens.
      tree: the deepest tree that `cycle` will be given; needed only beyond a depth of MIN_SCRATCH - 1.
      num_samples: rows a prompt, one after the other; sample j of row i has the key fold_in(row i's key, j).
      log_probs: whether the state keeps the log-probabilities of new tokens.
      chunk: most tokens of a prompt that one pass takes.
    Returns:
      DecodeState of batch * num_samples rows.
    """
    batch, width = tokens.shape
    lengths = jnp.array(lengths, jnp.int32)  # a copy, so that donating the state spares the caller's
    sizes = plan(width, max_new_tokens, capacity=capacity)
    draft = as_draft(target, draft)
    check_capacity(target, batch * num_samples, sizes.capacity)
    sampling.check(batch, target.config.vocab_size)
    keys = None if sampling.greedy else row_keys(key, batch, num_samples)
    # A row without a prompt, or with one that does not fit, can choose nothing.
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
    state, last = run_prompts(target, draft, state, min(-(-width // chunks), state.cache.rows))
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
    """An empty state with prompts yet to be run."""
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
    """Returns whether `insert(reuse=True)` may reuse the cached keys of a shared prefix, or must run the whole prompt.

    With dynamic RoPE, cached keys depend on the length of the prompt that they were computed for.
    """
    return target.config.rope.kind != "dynamic" and as_draft(target, draft).reusable


@jax.named_scope("prefill")
def run_prompts(
    target: Target, draft: Draft, state: DecodeState, chunk: int
) -> tuple[DecodeState, tuple[Float[Array, "batch hidden"], Float[Array, "batch features"] | None]]:
    """Runs every row's tokens from its cache's length on, `chunk` of them a pass.

    Returns:
      The state with its cache and the draft's memory filled, and what the target's pass gave at each row's last token:
      the hidden state, and the draft's taps, if it has any.
    """
    batch = state.tokens.shape[0]
    start, last = state.cache.length, state.lengths - 1
    if not reusable(target, draft):
        start = jnp.zeros_like(start)
    causal = jnp.broadcast_to(jnp.tri(chunk, dtype=bool), (batch, chunk, chunk))
    taps = draft.taps(target)

    def run_chunk(index, carry):
        cache, memory, at_last = carry
        # The last chunk may reach back over rows that are there already: they come out the same.
        begin = jnp.clip(start + index * chunk, 0, cache.rows - chunk)
        positions = begin[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]

        past = cache.with_length(begin)

        def attend(index, q, k, v, spec=PLAIN):
            # Write the new rows first, then attend below `begin`. Reading first lets XLA schedule the write early and
            # copy the cache.
            old = past.write_layer(index, k, v, begin)
            return attention(q, k, v, causal, old, spec=spec, positions=positions, in_blocks=True), (old.k, old.v)

        tokens = _tokens_at(state, positions)
        out, written = target.run(tokens, positions, attend, prompt_lengths=state.prompt_lengths, taps=taps)
        cache = dataclasses.replace(cache, k=[k for k, _ in written], v=[v for _, v in written])
        ends_here = (last >= begin) & (last < begin + chunk)
        offset = jnp.clip(last - begin, 0, chunk - 1)
        # The last position's vectors, from the chunk that holds it.
        at_last = jax.tree.map(
            lambda old, new: jnp.where(ends_here[:, None], take_one(new, offset), old), at_last, (out.hidden, out.taps)
        )
        # The last position waits for its next token, the first root.
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
    """The tokens at these positions; beyond the buffer its last one."""
    return jnp.take_along_axis(state.tokens, jnp.clip(positions, 0, state.tokens.shape[1] - 1), axis=1)


def choose_first(
    target: Target,
    draft: Draft,
    state: DecodeState,
    at_last: tuple[Float[Array, "batch hidden"], Float[Array, "batch features"] | None],
) -> DecodeState:
    """Commits each row's first new token, as a cycle commits those of its tree."""
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
