"""The cycle: one step of speculative decoding. Plain decoding is the same code with a tree of the root alone.

Letters: B batch, D tree depth, N nodes, F feature width.

    grow     the head drafts a tree from the last committed position
    verify   the target runs the N nodes in one pass under the tree's ancestor mask
    accept   the deepest path that the target agrees with, and the target's own next token (the bonus)
    commit   the accepted keys and values enter the target's cache, the tokens are appended
    extend   the accepted features enter the draft's cache, ready for the next tree
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from eagle_jax.choose import choose, shared_noise
from eagle_jax.drafting import Draft, draft_state, draft_tree, extend
from eagle_jax.models.cache import take_rows
from eagle_jax.models.llama import Llama
from eagle_jax.prompt import run_pending
from eagle_jax.state import DecodeState, append, at
from eagle_jax.tree import AcceptFn, Tree, TreeConfig


def cycle(
    target: Llama,
    draft: Draft | None,
    state: DecodeState,
    *,
    tree: TreeConfig = TreeConfig(),
    accept_fn: AcceptFn | None = None,
) -> DecodeState:
    """One speculative step for every row: 1 to tree.depth + 1 new tokens each. Rows that are done do not change.

    With draft=None one plain decoding step; `tree` is then ignored. Prompts that `insert` left are run first.

    Args:
      state: from `prefill` or an earlier `cycle`; jit this function and donate it.
      accept_fn: the acceptance rule (see tree/verify.py for its contract); default the rule that the state's
        sampling asks for.
    """
    depth = 0 if draft is None else tree.depth
    if depth > state.max_depth:
        raise ValueError(
            f"tree.depth = {depth} exceeds the {state.max_depth} this state has room for; pass tree= to prefill"
        )
    state = run_pending(target, draft, state)
    noise = None
    if state.sampling is not None and state.sampling.coupled:
        if accept_fn is not None:
            raise ValueError("coupled sampling drafts for its own acceptance rule; with another, leave coupled=False")
        noise = shared_noise(state, depth, target.config.vocab_size)
    root = at(state.tokens, jnp.maximum(state.lengths - 1, 0))
    nodes = Tree.root(root) if draft is None else draft_tree(target, draft, state, tree, noise)

    out = target(
        nodes.tokens,
        jnp.maximum(state.lengths - 1, 0)[:, None] + nodes.depths,
        nodes.ancestors(),
        prompt_lengths=state.prompt_lengths,
        cache=state.cache,
        taps=() if draft is None else draft.taps(target),
    )
    chosen = choose(state, nodes, target.logits(out.hidden), accept_fn, noise, depth)
    before, length = state.lengths, chosen.acceptance.length
    state = dataclasses.replace(
        state,
        cache=state.cache.write(take_rows(out.rows, chosen.path), state.cache.length),
        cycles=state.cycles + ~state.done,
        accepted=state.accepted
        + jnp.where(state.done, 0, 1)[:, None] * jax.nn.one_hot(length, state.accepted.shape[1], dtype=jnp.int32),
    )
    state = append(state, chosen.tokens, length + 1, chosen.sound, chosen.log_probs)
    if draft is None:
        return state
    features = jnp.take_along_axis(draft.features(out), chosen.path[:, :, None], axis=1)
    count = state.lengths - before
    past = draft_state(state)
    extended = extend(draft, target, past.cache, features, chosen.tokens, count, state.prompt_lengths)
    hidden = jnp.where((count > 0)[:, None], extended.hidden, past.hidden)
    return dataclasses.replace(state, draft=dataclasses.replace(extended, hidden=hidden))
