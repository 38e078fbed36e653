"""Prompts of a running batch: insert writes one into the state, and the next cycle runs it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, Key

from eagle_jax.decode.plan import PREFILL_CHUNK, limits_of
from eagle_jax.decode.prefill import choose_first, run_prompts
from eagle_jax.decode.state import DecodeState, check_memory, put_row, take_row
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models.target import Target
from eagle_jax.sampling import SamplingConfig
from eagle_jax.sharding import constrain

# PREFILL_CHUNK for pending prompts on a CPU, where padding costs as much as tokens.
CPU_PENDING_CHUNK = 32


def insert(
    state: DecodeState,
    row: int | Int[ArrayLike, ""],
    tokens: Int[ArrayLike, " prompt"],
    length: int | Int[ArrayLike, ""],
    key: Key[Array, ""] | None = None,
    *,
    max_new_tokens: int | Int[ArrayLike, ""] | None = None,
    sampling: SamplingConfig | None = None,
    reuse: bool = False,
) -> DecodeState:
    """Starts a new prompt in one sequence of a running state. The other sequences are unaffected.

    The next `cycle` runs the prompt. Jit this function and donate the state; `row` and `length` are data. The text is
    that of `generate` for the same prompt and key, in any batch.

    Args:
      row: index of the sequence; not checked in a trace.
      tokens: the prompt, right-padded. Every width compiles a program, so pad to one of a few.
      length: tokens of the prompt, at least 1 and below the state's capacity.
      key: typed; None in a greedy state.
      max_new_tokens: by default, and at most, as many as the capacity leaves.
      sampling: of this sequence, one number a field; by default unchanged.
      reuse: reuse the cached keys and values of the common prefix of the old text and the new prompt. A conversation's
        next turn then costs its new tokens only. Their logits differ by rounding, as other passes computed the prefix.
        Where the cache of a layer with a window is shorter than a sequence, only the whole of the old text is reused.
    Raises:
      ValueError: for concrete values outside their range. In a trace, a sequence with a prompt of impossible length is
        marked `failed`.
    """
    width = state.tokens.shape[1]
    tokens = jnp.asarray(tokens)
    _check_insert(state, row, tokens, length, key, sampling, max_new_tokens)
    length = jnp.asarray(length, jnp.int32)
    index = jnp.arange(width, dtype=jnp.int32)
    prompt = _padded(tokens, length, index)
    room = min(state.capacity, width)
    valid = (length >= 1) & (length <= min(tokens.shape[0], room - 1))

    old = take_row(state, row)
    reused = _reused(old, prompt, length, index) if reuse else jnp.zeros(1, jnp.int32)
    limit = limits_of(length, max_new_tokens, room)
    cleared = ("cycles", "accepted", "drafted", "log_probs")
    new = dataclasses.replace(
        old,
        **{name: jax.tree.map(jnp.zeros_like, getattr(old, name)) for name in cleared},
        tokens=prompt[None],
        lengths=length[None],
        limits=limit[None],
        done=~valid[None],
        failed=~valid[None],
        prompt_lengths=length[None],
        cache=old.cache.with_length(reused),
        keys=None if old.keys is None or key is None else key[None],
        sampling=old.sampling if sampling is None or old.sampling is None else sampling.rows(1),
        pending=valid[None],
    )
    return constrain(put_row(state, jnp.asarray(row, jnp.int32), new), state.cache)


def _padded(
    tokens: Int[Array, " prompt"], length: Int[Array, ""], index: Int[Array, " buffer"]
) -> Int[Array, " buffer"]:
    """Pads the prompt with zeros to the width of `index`, which counts from 0."""
    width = index.shape[0]
    row = jnp.zeros(max(width, tokens.shape[0]), jnp.int32).at[: tokens.shape[0]].set(tokens.astype(jnp.int32))[:width]
    return jnp.where(index < length, row, 0)


def _reused(
    old: DecodeState, prompt: Int[Array, " buffer"], length: Int[Array, ""], index: Int[Array, " buffer"]
) -> Int[Array, " 1"]:
    """Returns how many cached positions of the old text are valid for the prompt."""
    # Position i of the draft's cache pairs feature i with token i + 1, so n common tokens allow n - 1 positions. The
    # prompt's last token always runs, for its logits.
    common = jax.lax.argmin(jnp.append((prompt == old.tokens[0]) & (index < length), False), 0, jnp.int32)
    count = jnp.minimum(jnp.minimum(common - 1, length - 1), old.cache.length)
    count = jnp.where(old.failed | (old.lengths == 0), 0, jnp.maximum(count, 0)).astype(jnp.int32)
    if not old.cache.rings:
        return count
    # A ring has overwritten what a query at an earlier position would see: it can only go on from where it is.
    return jnp.where(count == old.cache.length, count, 0)


def _check_insert(state, row, tokens, length, key, sampling, max_new_tokens) -> None:
    batch = state.tokens.shape[0]
    if tokens.ndim != 1 or tokens.shape[0] == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be [P] integers, got {tokens.dtype}{list(tokens.shape)}")
    if not isinstance(row, jax.core.Tracer) and not 0 <= int(row) < batch:
        raise ValueError(f"row must be 0 to {batch - 1}, got {row}")
    longest = min(tokens.shape[0], state.capacity - 1, state.tokens.shape[1] - 1)
    if not isinstance(length, jax.core.Tracer) and not 1 <= int(length) <= longest:
        limits = f"tokens have {tokens.shape[0]} columns, capacity is {state.capacity}"
        raise ValueError(f"length = {length} is outside 1 to {longest} ({limits})")
    if isinstance(max_new_tokens, int | np.integer) and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens}")
    if state.sampling is None:
        if sampling is not None and not sampling.greedy:
            raise ValueError("the state is greedy; start it with temperatures in an array, for rows to sample")
        return
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim != 0:
        raise ValueError("key must be the row's typed key, jax.random.key(seed), in a state that samples")
    if sampling is not None:
        vocab = 0 if state.sampling.logit_bias is None else state.sampling.logit_bias.shape[1]
        if (sampling.logit_bias is None) != (vocab == 0) or sampling.coupled != state.sampling.coupled:
            raise ValueError("a row's sampling must have a logit_bias, or be coupled, just where the state's is")
        sampling.check(1, vocab)


def run_pending(target: Target, draft: Draft, state: DecodeState) -> DecodeState:
    """Runs pending prompts one at a time, and chooses the first new token of each."""
    check_memory(state, draft)

    def run_in(chunk):
        return functools.partial(run_prompts, target, draft, chunk=min(chunk, state.cache.most_new))

    alone = state.tokens.shape[0] == 1  # a batch of one needs no copy of its row

    def run_one(state):
        row = jax.lax.argmax(state.pending, 0, jnp.int32)
        one = _with_fresh_memory(target, draft, state if alone else take_row(state, row))
        one, last = jax.lax.platform_dependent(one, cpu=run_in(CPU_PENDING_CHUNK), default=run_in(PREFILL_CHUNK))
        one = dataclasses.replace(choose_first(target, draft, one, last), pending=jnp.zeros(1, bool))
        return one if alone else put_row(state, row, one)

    return jax.lax.while_loop(lambda state: state.pending.any(), run_one, state)


def _with_fresh_memory(target: Target, draft: Draft, state: DecodeState) -> DecodeState:
    """Resets the draft's memory in the state of one sequence, unless a prefix of the old text is reused."""
    reused, fresh = state.cache.length > 0, draft.start(target, 1, state.positions)
    if not jax.tree.leaves(fresh):  # plain decoding, which preserves the memory of any draft
        return state

    def choose_memory(old, new):
        return jnp.where(reused.reshape(1, *[1] * (old.ndim - 1)), old, new)

    return dataclasses.replace(state, memory=jax.tree.map(choose_memory, state.memory, fresh))
