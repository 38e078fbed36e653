"""Commit: accepted keys, values and tokens enter the state; then the draft's memory is updated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax.decode.accept import Chosen
from eagle_jax.decode.state import DecodeState
from eagle_jax.drafts.protocol import Committed, Draft
from eagle_jax.models.cache import take_tokens
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.tree import Tree


@jax.named_scope("commit")
def commit(state: DecodeState, chosen: Chosen, output: TargetOutput | None = None) -> DecodeState:
    """Commits the chosen tokens: writes their keys and values, appends them, and moves lengths and counters.

    Args:
      output: of the target on the tree. None for the first token after a prompt, whose keys and values are in the cache
        already; that token is not counted as a cycle.
    """
    length = chosen.acceptance.length
    if output is not None:
        start = state.cache.length
        if output.hidden.shape[1] == 1:
            # Adds 0, but makes the write depend on the sampled token. A one-node tree's commit is known early; XLA
            # would write before attention has read, and copy the cache.
            start += jnp.minimum(chosen.tokens[:, 0], 0)
        counted = jax.nn.one_hot(length, state.accepted.shape[1], dtype=jnp.int32)
        state = dataclasses.replace(
            state,
            cache=state.cache.write(take_tokens(output.new_kv, chosen.path), start),
            cycles=state.cycles + ~state.done,
            accepted=state.accepted + ~state.done[:, None] * counted,
        )
    return _append(state, chosen.tokens, length + 1, chosen.finite, chosen.log_probs)


def newly_committed(
    before: DecodeState,
    nodes: Tree,
    output: TargetOutput,
    logits: Float[Array, "batch nodes vocab"] | None,
    path: Int[Array, "batch path"],
    tokens: Int[Array, "batch path"],
    count: Int[Array, " batch"],
) -> Committed:
    """Returns the positions that a commit added, as the input of `Draft.update`.

    Args:
      before: the state before the commit.
      nodes: the verified tree; for a prompt's first token, the root alone.
      output, logits: of the target at every node; logits are None for a prompt's first token.
      path: the accepted nodes, padded with the root.
      tokens: the accepted tokens, then the bonus; the first `count` are new.
    """

    def on_path(values):
        if nodes.num_nodes == 1:
            return values
        return jnp.take_along_axis(values, path.reshape(*path.shape, *[1] * (values.ndim - 2)), axis=1)

    return Committed(
        tokens=on_path(nodes.tokens),
        next_tokens=tokens,
        start=before.root_position,
        count=count,
        output=TargetOutput(on_path(output.hidden), None if output.taps is None else on_path(output.taps)),
        prompt_lengths=before.prompt_lengths,
        tree=None if logits is None else nodes,
        logits=logits,
    )


@jax.named_scope("update")
def update(target: Target, draft: Draft, state: DecodeState, committed: Committed) -> DecodeState:
    """Returns the state with the draft's memory updated by the newly committed positions."""
    return dataclasses.replace(state, memory=draft.update(target, state.memory, committed))


def _append(
    state: DecodeState,
    new: Int[Array, "batch path"],
    count: Int[Array, " batch"],
    finite: Int[Array, " batch"],
    log_probs: Float[Array, "batch path"] | None,
) -> DecodeState:
    """Appends the first `count` new tokens, up to a stop token, the limit, or non-finite logits.

    Args:
      count: accepted draft tokens, and the bonus.
      finite: number of leading tokens that come from finite logits.
      log_probs: of the new tokens, if the state holds them.
    """
    index = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    stops = jnp.any(new[:, :, None] == state.stop_tokens[None, None], axis=-1)
    first_stop = jax.lax.argmax(stops, 1, jnp.int32)
    until_stop = jnp.where(stops.any(1), first_stop + 1, new.shape[1])
    wanted = jnp.minimum(jnp.minimum(count, until_stop), state.limits - state.lengths)
    taken = jnp.where(state.done, 0, jnp.minimum(wanted, finite))
    lengths = state.lengths + taken
    stopped = jnp.any(stops & (index < taken[:, None]), axis=1)
    failed = ~state.done & (finite < wanted)

    # values[b, lengths[b] + i] = new[b, i] for i < taken[b], as one elementwise pass rather than a scatter.
    offset = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None] - state.lengths[:, None]

    def place(values, new):
        placed = jnp.take_along_axis(new, jnp.clip(offset, 0, new.shape[1] - 1), axis=1)
        return jnp.where((offset >= 0) & (offset < taken[:, None]), placed, values)

    return dataclasses.replace(
        state,
        tokens=place(state.tokens, new),
        drafted=place(state.drafted, index < count[:, None] - 1),
        log_probs=None if log_probs is None or state.log_probs is None else place(state.log_probs, log_probs),
        lengths=lengths,
        cache=state.cache.with_length(jnp.maximum(lengths - 1, 0)),
        done=state.done | stopped | failed | (lengths >= state.limits),
        failed=state.failed | failed,
    )
