"""The cycle: one step of speculative decoding, in five phases.

Plain decoding is the same code with a tree of the root alone.

    propose  the draft proposes a tree of next tokens
    verify   the target runs all nodes in one pass, under the tree's ancestor mask
    accept   the acceptance rule picks a path, and the target's next token after it (the bonus)
    commit   the path's keys and values are written to the target's cache, its tokens appended
    update   the draft updates its memory with the newly committed positions
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eagle_jax.decode.accept import accept, asks_for
from eagle_jax.decode.commit import commit, newly_committed, update
from eagle_jax.decode.insert import run_pending
from eagle_jax.decode.state import DecodeState, check_memory, context_of
from eagle_jax.drafts.none import as_draft
from eagle_jax.drafts.protocol import Context, Draft, Proposal
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.sharding import constrain
from eagle_jax.tree import Acceptance, AcceptFn, Tree, TreeConfig, TreePolicy


class Step(NamedTuple):
    """The result of a cycle: the state after it, the tree that was verified, and the acceptance."""

    state: DecodeState
    tree: Tree
    acceptance: Acceptance


def cycle(
    target: Target,
    draft: Draft | None,
    state: DecodeState,
    *,
    tree: TreePolicy = TreeConfig(),
    accept_fn: AcceptFn | None = None,
) -> DecodeState:
    """Runs one speculative step: 1 to depth + 1 new tokens for every sequence that is not done.

    With draft=None this is a plain decoding step, and `tree` is ignored. Pending prompts from `insert` run first.

    Args:
      state: from `prefill` or an earlier `cycle`; jit this function and donate it.
      tree: how the tree grows; ignored by drafts with a fixed tree.
      accept_fn: the acceptance rule (tree/accept.py has its contract); by default chosen by the state's sampling.
    """
    draft = as_draft(target, draft)
    state = run_pending(target, draft, state)
    return step(target, draft, state, tree=tree, accept_fn=accept_fn).state


def step(
    target: Target,
    draft: Draft | None,
    state: DecodeState,
    *,
    tree: TreePolicy = TreeConfig(),
    accept_fn: AcceptFn | None = None,
) -> Step:
    """Runs a cycle of a state without pending prompts.

    Unlike `cycle`, whose compiled program also contains a prefill for pending prompts.
    """
    draft = as_draft(target, draft)
    depth = draft.depth(tree)
    check_state(state, draft, depth, accept_fn)
    context = context_of(state, target.config.vocab_size, depth)
    proposal = propose(target, draft, context, tree)
    nodes = proposal.tree
    output, logits = verify(target, draft, state, nodes)
    chosen = accept(context, proposal, logits, accept_fn, depth=depth, log_probs=state.log_probs is not None)
    after = commit(state, chosen, output)
    count = after.lengths - state.lengths
    committed = newly_committed(state, nodes, output, logits, chosen.path, chosen.tokens, count)
    after = update(target, draft, after, committed)
    return Step(constrain(after, target), nodes, chosen.acceptance)


@jax.named_scope("propose")
def propose(target: Target, draft: Draft, context: Context, tree: TreePolicy) -> Proposal:
    """Returns the draft's tree under every sequence's last token; in plain decoding, that token alone."""
    proposal = draft.propose(target, context, tree, context.noise)
    # With 64-bit types enabled, a user's draft or policy may produce them.
    narrow = Tree(tokens=jnp.int32, parents=jnp.int32, depths=jnp.int32, scores=jnp.float32)
    return proposal._replace(tree=jax.tree.map(lambda x, dtype: x.astype(dtype), proposal.tree, narrow))


@jax.named_scope("verify")
def verify(
    target: Target, draft: Draft | None, state: DecodeState, nodes: Tree
) -> tuple[TargetOutput, Float[Array, "batch nodes vocab"]]:
    """Runs the target on all nodes of a tree; returns its output and the logits after every node."""
    output = target(
        nodes.tokens,
        state.root_position[:, None] + nodes.depths,
        nodes.ancestors(),
        prompt_lengths=state.prompt_lengths,
        cache=state.cache,
        taps=as_draft(target, draft).taps(target),
    )
    return output, target.logits(output.hidden)


def check_state(state: DecodeState, draft: Draft, depth: int, accept_fn: AcceptFn | None) -> None:
    """Raises ValueError, naming the fix, if the state was not made for this draft, depth or acceptance rule."""
    check_memory(state, draft)
    if depth > state.max_depth:
        raise ValueError(
            f"tree.depth = {depth} exceeds the {state.max_depth} this state has room for; pass tree= to prefill"
        )
    coupled = state.sampling is not None and state.sampling.coupled
    if coupled and accept_fn is not None and not asks_for(accept_fn, "noise"):
        raise ValueError(
            "coupled sampling drafts for its own acceptance rule; with another, leave coupled=False, or let the rule "
            "take noise= and choose by it"
        )
