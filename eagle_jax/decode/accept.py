"""Accept: from the target's logits at every node of a tree to the path and tokens to commit."""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from eagle_jax.drafts.protocol import Context, Proposal
from eagle_jax.keys import token_keys
from eagle_jax.sampling import process
from eagle_jax.tree import (
    Acceptance,
    AcceptFn,
    Tree,
    accept_coupled,
    accept_greedy,
    accept_sampled,
)


class Chosen(NamedTuple):
    """The tokens to commit.

    acceptance: the rule's decision.
    path: the accepted nodes, padded with the root.
    tokens: the accepted tokens, then the bonus.
    finite: number of leading tokens that come from finite logits.
    log_probs: of the tokens, under the target's unprocessed distribution; None if the state holds none.
    """

    acceptance: Acceptance
    path: Int32[Array, "batch path"]
    tokens: Int32[Array, "batch path"]
    finite: Int32[Array, " batch"]
    log_probs: Float32[Array, "batch path"] | None


@jax.named_scope("accept")
def accept(
    context: Context,
    proposal: Proposal,
    logits: Float[Array, "batch nodes vocab"],
    accept_fn: AcceptFn | None = None,
    *,
    depth: int = 0,
    log_probs: bool = False,
) -> Chosen:
    """Applies the acceptance rule to the target's logits after every node.

    Args:
      context: from which the tree was drafted. With coupled sampling its noise chooses the tokens.
      accept_fn: the caller's rule; by default `accept_greedy`, `accept_sampled` or `accept_coupled`, by the sampling.
      depth: of the tree.
      log_probs: whether to compute the log-probabilities of the tokens.
    """
    nodes, sampling, processed = proposal.tree, context.sampling, logits
    if sampling is not None:
        processed = process(logits, sampling, functools.partial(seen_tokens, context, nodes, logits.shape[-1]))
    keys = None if context.keys is None else token_keys(context.keys, context.lengths, 1)[:, 0]
    if accept_fn is not None:
        offered = {"draft_probs": proposal.probs, "noise": context.noise}
        extra = {name: value for name, value in offered.items() if asks_for(accept_fn, name)}
        acceptance = jax.tree.map(lambda x: x.astype(jnp.int32), accept_fn(nodes, processed, keys, **extra))
    elif sampling is None:
        acceptance = accept_greedy(nodes, processed)
    elif context.noise is not None:
        acceptance = accept_coupled(nodes, processed, context.noise)
    else:
        assert keys is not None
        acceptance = accept_sampled(nodes, processed, keys, proposal.probs)

    path = jnp.maximum(acceptance.path[:, : depth + 1], 0)  # pads with the root, a valid index; masked by length
    if path.shape[1] < depth + 1:  # a tree with fewer nodes than levels
        path = jnp.pad(path, [(0, 0), (0, depth + 1 - path.shape[1])])
    drafted = jnp.take_along_axis(nodes.tokens, path, axis=1)[:, 1:]
    last = jnp.zeros_like(acceptance.bonus)[:, None]
    tokens = jnp.concatenate([drafted, last], axis=1)
    is_bonus = jnp.arange(depth + 1, dtype=jnp.int32)[None] == acceptance.length[:, None]
    tokens = jnp.where(is_bonus, acceptance.bonus[:, None], tokens)

    # A token is valid if its logits are finite and at least one token is not masked by the bias.
    finite = jnp.isfinite(logits).all(axis=-1)
    if sampling is not None:
        finite &= jnp.isfinite(processed.max(axis=-1))
    finite = jnp.take_along_axis(finite, path, axis=1)
    on_tokens = None
    if log_probs:
        on_path = jax.nn.log_softmax(jnp.take_along_axis(logits, path[:, :, None], axis=1), axis=-1)
        on_tokens = jnp.take_along_axis(on_path, tokens[:, :, None], axis=2)[:, :, 0]
    return Chosen(acceptance, path, tokens, _leading(finite), on_tokens)


def asks_for(accept_fn: AcceptFn, argument: str) -> bool:
    """Returns whether the signature of an acceptance rule names an argument beyond tree, logits and keys."""
    try:
        return argument in inspect.signature(accept_fn).parameters
    except ValueError:  # a callable without a signature, such as a C function
        return False


def seen_tokens(context: Context, nodes: Tree, vocab_size: int) -> Bool[Array, "batch nodes {vocab_size}"]:
    """Returns which tokens occur in the text up to each node: committed tokens, its ancestors, and itself."""
    batch, count = nodes.tokens.shape
    written = jnp.arange(context.tokens.shape[1], dtype=jnp.int32)[None] < context.lengths[:, None]
    row, node = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(count, dtype=jnp.int32)[None, :, None]
    in_text = jnp.zeros((batch, vocab_size), bool)
    in_text = in_text.at[row, jnp.where(written, context.tokens, vocab_size)].set(True, mode="drop")
    on_path = jnp.zeros((batch, count, vocab_size), bool)
    ids = jnp.where(nodes.ancestors(), nodes.tokens[:, None, :], vocab_size)  # [batch, nodes, nodes]
    on_path = on_path.at[row[:, :, None], node, ids].set(True, mode="drop")
    return in_text[:, None] | on_path


def _leading(flags: Bool[Array, "batch path"]) -> Int32[Array, " batch"]:
    """Counts the flags before the first False."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
