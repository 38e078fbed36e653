"""Acceptance rules: which drafted path the target agrees with.

A node can be accepted at most with probability p(path), the product of the target's probabilities along its path.
`accept_sampling` attains it, so for a given tree no lossless rule accepts more on average. Only better drafts do:
`accept_coupled` shares the target's Gumbel noise with the draft.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped

from eagle_jax.tree.tree import Tree

PAD = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Acceptance:
    """The decision of an acceptance rule.

    path: node indices from the root to the last accepted node, padded with PAD.
    length: accepted draft tokens; the root does not count.
    bonus: the target's own token after the last accepted node: the next root.
    """

    path: Int32[Array, "batch nodes"]
    length: Int32[Array, " batch"]
    bonus: Int32[Array, " batch"]


# accept_fn(tree, logits [batch, nodes, vocab], keys [batch]) -> Acceptance, a plain callable that is traced.
#
# logits: the target's, after every node, processed. Their softmax is the distribution to preserve; in a sequence of
#   temperature 0 they are 0 and -inf.
# keys: typed, one a sequence, different in every cycle; None in the greedy program.
#
# A rule must be lossless: whatever the tree holds, accepted tokens and bonus follow that distribution. It may use the
# keys in any way, because the tree was drafted without them.
#
# A rule whose signature names these also gets, by keyword:
#   draft_probs [batch, nodes, vocab]: the distribution q that each node's children were sampled from (see
#     `Proposal.probs`), or None.
#   noise [batch, depth + 1, vocab]: the Gumbel noise of the token after each depth if sampling is coupled, else None.
#     The tree was drafted with this noise. To stay lossless, the rule must choose the token after a node as
#     argmax(logits + noise) at the node's depth.
AcceptFn = Callable[..., Acceptance]


def accept_greedy(
    tree: Tree, logits: Float[Array, "batch nodes vocab"], keys: Key[Array, " batch"] | None = None
) -> Acceptance:
    """Accepts the deepest node whose every step is its parent's argmax; the bonus is the argmax there.

    The first wins among equally deep nodes, which only duplicate siblings can be.
    """
    del keys
    choice = argmax(logits)
    agrees = jnp.take_along_axis(choice, jnp.maximum(tree.parents, 0), axis=1) == tree.tokens
    end, path = _deepest(tree, agrees)
    return Acceptance(path, length=_gather(tree.depths, end), bonus=_gather(choice, end))


def accept_sampling(
    tree: Tree, probs: Float[Array, "batch nodes vocab"], uniforms: Float[Array, "batch nodes-1"]
) -> tuple[Acceptance, Float[Array, "batch vocab"]]:
    """Walks down from the root. Children are tried in order; child x is accepted with its probability under residual p.

    After a rejection p(x) is set to 0 and the rest renormalised. A child with the token of an earlier sibling is
    skipped. A drafted token is therefore accepted with exactly its probability (EAGLE, arXiv 2401.15077, appendix A;
    SpecInfer, arXiv 2305.09781, for deterministic drafts).

    Args:
      probs: the target's distribution after every node.
      uniforms: in [0, 1), consumed from the left, one for each child tried; accept when u < p.
    Returns:
      Acceptance with a bonus of -1, and the residual: the distribution to draw the bonus token from.
    """
    batch, nodes = tree.tokens.shape
    parents = jnp.maximum(tree.parents, 0)
    not_root = jnp.arange(nodes, dtype=jnp.int32)[None] > 0
    p = jax.vmap(lambda row, parent, token: row[parent, token])(probs, parents, tree.tokens)  # under the parent

    # Decide every node independently, as if the walk reached it; a node is reached if all its ancestors accepted.
    siblings = (parents[:, :, None] == parents[:, None, :]) & not_root[:, :, None] & not_root[:, None, :]
    earlier = siblings & jnp.tri(nodes, k=-1, dtype=bool)[None]  # row i: the siblings before node i
    duplicate = jnp.any(earlier & (tree.tokens[:, :, None] == tree.tokens[:, None, :]), axis=-1)
    tried_before = earlier & ~duplicate[:, None, :]
    # Residual mass after rejecting the earlier siblings, clamped at 0 against rounding.
    mass = jnp.maximum(1 - jnp.where(tried_before, p[:, None, :], 0).sum(-1), 0)
    # Uniforms consumed up to a node: one for it and one for each sibling tried before it, at every level of its path.
    tries = jnp.where(not_root, 1 + tried_before.sum(-1, dtype=jnp.int32), 0)
    ancestors = tree.ancestors()
    consumed = jnp.where(ancestors, tries[:, None, :], 0).sum(-1, dtype=jnp.int32)
    index = jnp.clip(consumed - 1, 0, max(nodes - 2, 0))
    u = jnp.take_along_axis(jnp.pad(uniforms, [(0, 0), (0, 1)]), index, axis=1)
    accepts = not_root & ~duplicate & (u * mass < p)
    first = accepts & ~jnp.any(earlier & accepts[:, None, :], axis=-1)
    end, path = _deepest(tree, first)

    at_end = jnp.take_along_axis(probs, end[:, None, None], axis=1)[:, 0]
    rejected = jnp.where((parents == end[:, None]) & not_root, tree.tokens, probs.shape[-1])
    rest = jax.vmap(lambda row, tokens: row.at[tokens].set(0, mode="drop"))(at_end, rejected)
    total = rest.sum(-1, keepdims=True)
    # The residual can only be empty through rounding (about once in 2^24); fall back to p.
    residual = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), at_end)
    return Acceptance(path, length=_gather(tree.depths, end), bonus=jnp.full(batch, -1, jnp.int32)), residual


def accept_drawn(
    tree: Tree,
    probs: Float[Array, "batch nodes vocab"],
    draft_probs: Float[Array, "batch nodes vocab"],
    uniforms: Float[Array, "batch nodes-1"],
) -> tuple[Acceptance, Float[Array, "batch vocab"]]:
    """Accepts children that were sampled from a draft distribution q without replacement.

    Walks down from the root. Children are tried in order; child x is accepted with min(1, p(x) / q(x)). After a
    rejection the residual of p is max(p - q, 0), renormalised. The next sibling was sampled from q without x,
    renormalised. A child is skipped once q is empty.

    This is recursive rejection sampling without replacement (Jeon et al., arXiv 2402.14160). On a chain it is
    speculative sampling (arXiv 2211.17192, 2302.01318).

    Args:
      probs: p, the target's distribution after every node.
      draft_probs: q, from which the first child of every node was sampled. Zeros at a node mean that its children were
        selected deterministically; `accept_sampling`'s rule applies to them.
      uniforms: in [0, 1), consumed from the left, one for each child tried.
    Returns:
      Acceptance with a bonus of -1, and the residual: the distribution to draw the bonus token from.
    """
    batch, nodes = tree.tokens.shape
    rows = jnp.arange(batch, dtype=jnp.int32)

    def try_node(i, walk):
        node, p, q, tried = walk  # the node reached, the residuals of p and q there, and the uniforms consumed
        token = tree.tokens[:, i]
        chosen = (draft_probs[rows, node] == 0).all(axis=-1)
        this = jax.nn.one_hot(token, p.shape[-1], dtype=bool)
        drawn_from = jnp.where(chosen[:, None], this.astype(p.dtype), q)
        q_token = drawn_from[rows, token]
        tries = (tree.parents[:, i] == node) & (q_token > 0)
        u = uniforms[rows, jnp.minimum(tried, nodes - 2)]
        accepts = tries & (u * q_token < p[rows, token])
        rejects = (tries & ~accepts)[:, None]
        p = jnp.where(rejects, _normalised(jnp.maximum(p - drawn_from, 0), p), p)
        q = jnp.where(rejects, _normalised(jnp.where(this, 0, q), jnp.zeros_like(q)), q)
        p = jnp.where(accepts[:, None], probs[:, i], p)
        q = jnp.where(accepts[:, None], draft_probs[:, i], q)
        return jnp.where(accepts, i, node), p, q, tried + tries

    start = jnp.zeros(batch, jnp.int32), probs[:, 0], draft_probs[:, 0], jnp.zeros(batch, jnp.int32)
    # Parents precede their children, so one pass over the nodes in order is the walk.
    end, residual, _, _ = jax.lax.fori_loop(1, nodes, try_node, start)
    path = path_to(tree, tree.ancestors(), end)
    return Acceptance(path, length=_gather(tree.depths, end), bonus=jnp.full(batch, -1, jnp.int32)), residual


def _normalised(
    weights: Float[Array, "batch vocab"], otherwise: Float[Array, "batch vocab"]
) -> Float[Array, "batch vocab"]:
    """Normalises to a sum of 1; returns `otherwise` where all weights are 0."""
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), otherwise)


def accept_sampled(
    tree: Tree,
    logits: Float[Array, "batch nodes vocab"],
    keys: Key[Array, " batch"] | None,
    draft_probs: Float[Array, "batch nodes vocab"] | None = None,
) -> Acceptance:
    """Applies `accept_sampling`, or `accept_drawn` given draft_probs, with randomness from `keys`.

    The bonus is sampled from the residual.
    """
    if keys is None:
        raise ValueError("accept_sampled needs a key for each row; the state was prefilled for greedy decoding")
    nodes, vocab = logits.shape[1:]
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (nodes - 1,), jnp.float32))(keys)
    probs = jax.nn.softmax(logits, axis=-1)
    if draft_probs is None:
        acceptance, residual = accept_sampling(tree, probs, uniforms)
    else:
        acceptance, residual = accept_drawn(tree, probs, draft_probs, uniforms)
    bonus = argmax(jnp.log(residual) + choice_noise(keys, vocab))
    return dataclasses.replace(acceptance, bonus=bonus)


def accept_coupled(
    tree: Tree, logits: Float[Array, "batch nodes vocab"], noise: Float[Array, "batch path vocab"]
) -> Acceptance:
    """Applies the greedy rule to logits + noise, which samples each token from softmax(logits) (Gumbel-max trick).

    The token at each depth depends on the target's logits and that depth's noise only. The text is therefore the same
    whatever the tree holds, even if the draft maximised its logits plus the same noise.

    Such a draft is accepted more often. A single draft token is accepted with probability at least (1 - d) / (1 + d),
    where d is the total variation distance between draft and target (Daliri, Musco and Suresh, "Coupling without
    Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978). For several drafts see Rowan, Phan and
    Khisti, "List-Level Distribution Coupling", arXiv 2506.05632.

    Args:
      logits: processed.
      noise: standard Gumbel noise for the token after each depth.
    """
    at_depth = jax.vmap(lambda rows, depths: rows[depths])(noise, tree.depths)
    return accept_greedy(tree, logits + at_depth)


def choice_noise(keys: Key[Array, "*keys"], vocab_size: int) -> Float32[Array, "*keys {vocab_size}"]:
    """Returns standard Gumbel noise for every key: argmax(logits + noise) samples from softmax(logits)."""
    draw = functools.partial(jax.random.gumbel, shape=(vocab_size,), dtype=jnp.float32)
    flat = jax.vmap(lambda key: draw(jax.random.fold_in(key, 1)))(keys.reshape(-1))
    return flat.reshape(*keys.shape, vocab_size)


def argmax(x: Float[Array, "*axes vocab"]) -> Int32[Array, "*axes"]:
    """Returns the argmax over the last axis, the first of equals; x has no NaN.

    On a CPU this is many times faster than `jnp.argmax`.
    """
    size = x.shape[-1]
    index = jnp.arange(size, dtype=jnp.int32).reshape((1,) * (x.ndim - 1) + (size,))
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, size - 1).min(axis=-1)


def _deepest(
    tree: Tree, agrees: Bool[Array, "batch nodes"]
) -> tuple[Int32[Array, " batch"], Int32[Array, "batch nodes"]]:
    """Returns the deepest node, the first of equals, for which it and its ancestors agree, and the path to it.

    The root always agrees.
    """
    ancestors = tree.ancestors()
    agrees = agrees.at[:, 0].set(True)
    accepted = jnp.all(agrees[:, None, :] | ~ancestors, axis=-1)
    end = jax.lax.argmax(jnp.where(accepted, tree.depths, -1), 1, jnp.int32)
    return end, path_to(tree, ancestors, end)


def path_to(
    tree: Tree, ancestors: Bool[Array, "batch nodes nodes"], end: Int[Array, " batch"]
) -> Int32[Array, "batch nodes"]:
    """Returns the nodes from the root to `end`, padded with PAD.

    In: parents [-1, 0, 0, 1, 3], end 4. Out: [0, 1, 3, 4, -1].
    """
    on_path = jnp.take_along_axis(ancestors, end[:, None, None], axis=1)  # [batch, 1, nodes]
    nodes = jnp.arange(tree.num_nodes, dtype=jnp.int32)
    at_depth = on_path & (tree.depths[:, None, :] == nodes[None, :, None])  # [batch, depth, nodes]
    return jnp.max(jnp.where(at_depth, nodes[None, None, :], PAD), axis=-1)


def _gather(values: Shaped[Array, "batch nodes"], index: Int[Array, " batch"]) -> Shaped[Array, " batch"]:
    """Gathers one node's value for every sequence."""
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
