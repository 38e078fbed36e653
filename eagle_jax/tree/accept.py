"""Acceptance: which drafted path the target agrees with.

No rule can accept more of a given tree than `accept_sampling` does, on average: an accepted node is a beginning of the
text, which has probability p(its path), the product of the target's probabilities along it, and `accept_sampling`
accepts it with just that probability. More is to be had by drafting better: `accept_coupled` lets the draft know the
random numbers that the target will choose by.
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
    """What verification decided, a row of the batch each.

    path: node indices from the root down to the last accepted node, then PAD.
    length: accepted draft tokens (the root is not one).
    bonus: the token that the target itself puts after the last accepted node: the next root.
    """

    path: Int32[Array, "batch nodes"]
    length: Int32[Array, " batch"]
    bonus: Int32[Array, " batch"]


# accept_fn(tree, logits [batch, nodes, vocab], keys [batch]) -> Acceptance, a plain callable under jit.
# logits: the target's after every node, processed: their softmax is the distribution to keep (0 and -inf in a row of
#   temperature 0). keys: one a row, fresh in every cycle; None when decoding is greedy.
# A rule must be lossless: accepted tokens and bonus together follow that distribution, whatever the tree holds. It may
# use the keys in any way, as the tree was drafted without them.
# A rule whose signature names them gets by keyword, too:
#   draft_probs [batch, nodes, vocab]: the distribution q that each node's children were drawn from (see
#     `Proposal.probs`), or None.
#   noise [batch, depth + 1, vocab]: the Gumbel noise of the token after each depth with coupled sampling, else None.
#     The tree was drafted with this noise, so a rule that gets it has a duty: the token after a node must be
#     argmax(logits + noise) at the node's depth. A rule that draws otherwise would not be lossless, as the tree depends
#     on the noise.
AcceptFn = Callable[..., Acceptance]


def accept_greedy(
    tree: Tree, logits: Float[Array, "batch nodes vocab"], keys: Key[Array, " batch"] | None = None
) -> Acceptance:
    """Keeps the deepest node whose every step is its parent's argmax; the bonus is the argmax there.

    Of equally deep ones (only possible with duplicate siblings) the first.
    """
    del keys
    choice = argmax(logits)
    agrees = jnp.take_along_axis(choice, jnp.maximum(tree.parents, 0), axis=1) == tree.tokens
    end, path = _deepest(tree, agrees)
    return Acceptance(path, length=_at(tree.depths, end), bonus=_at(choice, end))


def accept_sampling(
    tree: Tree, probs: Float[Array, "batch nodes vocab"], uniforms: Float[Array, "batch nodes-1"]
) -> tuple[Acceptance, Float[Array, "batch vocab"]]:
    """Walks down from the root, tries the children in order, and keeps x with the probability p(x) that it has left.

    A rejected x leaves p: p(x) = 0, and the rest is renormalised. A child whose token an earlier sibling had is not
    tried. So a drafted token is accepted with exactly its probability (EAGLE, arXiv 2401.15077, appendix A; SpecInfer,
    arXiv 2305.09781, for drafts chosen with certainty).

    Args:
      probs: the target's distribution after every node.
      uniforms: in [0, 1), consumed from the left, one for each proposal tried; accept when u < p.
    Returns:
      Acceptance with a bonus of -1, and the residual: the distribution to draw the bonus token from.
    """
    batch, nodes = tree.tokens.shape
    parents = jnp.maximum(tree.parents, 0)
    not_root = jnp.arange(nodes, dtype=jnp.int32)[None] > 0
    p = jax.vmap(lambda row, parent, token: row[parent, token])(probs, parents, tree.tokens)  # after the parent

    # Every node decides as if the walk came by; it comes by where all decisions above it were for it.
    siblings = (parents[:, :, None] == parents[:, None, :]) & not_root[:, :, None] & not_root[:, None, :]
    earlier = siblings & jnp.tri(nodes, k=-1, dtype=bool)[None]  # row i: the siblings before node i
    duplicate = jnp.any(earlier & (tree.tokens[:, :, None] == tree.tokens[:, None, :]), axis=-1)
    tried_before = earlier & ~duplicate[:, None, :]
    # What the tried siblings, rejected if the walk comes here, left of p; not below 0 by rounding.
    left = jnp.maximum(1 - jnp.where(tried_before, p[:, None, :], 0).sum(-1), 0)
    # Uniforms consumed until a node is accepted: one for it and for each sibling tried before it, at every level.
    tries = jnp.where(not_root, 1 + tried_before.sum(-1, dtype=jnp.int32), 0)
    ancestors = tree.ancestors()
    consumed = jnp.where(ancestors, tries[:, None, :], 0).sum(-1, dtype=jnp.int32)
    own = jnp.clip(consumed - 1, 0, max(nodes - 2, 0))
    u = jnp.take_along_axis(jnp.pad(uniforms, [(0, 0), (0, 1)]), own, axis=1)
    accepts = not_root & ~duplicate & (u * left < p)
    first = accepts & ~jnp.any(earlier & accepts[:, None, :], axis=-1)
    end, path = _deepest(tree, first)

    at_end = jnp.take_along_axis(probs, end[:, None, None], axis=1)[:, 0]
    rejected = jnp.where((parents == end[:, None]) & not_root, tree.tokens, probs.shape[-1])
    rest = jax.vmap(lambda row, tokens: row.at[tokens].set(0, mode="drop"))(at_end, rejected)
    total = rest.sum(-1, keepdims=True)
    # Children of all of p cannot all be rejected, but by rounding (once in 2^24): then p itself, not nothing.
    residual = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), at_end)
    return Acceptance(path, length=_at(tree.depths, end), bonus=jnp.full(batch, -1, jnp.int32)), residual


def accept_drawn(
    tree: Tree,
    probs: Float[Array, "batch nodes vocab"],
    draft_probs: Float[Array, "batch nodes vocab"],
    uniforms: Float[Array, "batch nodes-1"],
) -> tuple[Acceptance, Float[Array, "batch vocab"]]:
    """`accept_sampling` for children that were drawn at random from probabilities q, one after the other.

    Walks down from the root and tries the children in order: x is accepted with min(1, p(x) / q(x)); if it is rejected,
    what is left to accept is p - q where that is positive, renormalised, and the next sibling was drawn from q without
    x, renormalised (recursive rejection sampling without replacement: Jeon et al., arXiv 2402.14160; a chain of it is
    speculative sampling, arXiv 2211.17192 and 2302.01318). Where q has no token left, a child is not tried.

    Args:
      probs: p, the target's distribution after every node.
      draft_probs: q, from which the first child of every node was drawn. A row of zeros: the children were chosen
        without chance, and are accepted as `accept_sampling` does.
      uniforms: in [0, 1), consumed from the left, one for each proposal tried.
    Returns:
      Acceptance with a bonus of -1, and the residual: the distribution to draw the bonus token from.
    """
    batch, nodes = tree.tokens.shape
    rows = jnp.arange(batch, dtype=jnp.int32)

    def try_node(i, walk):
        at, p, q, tried = walk  # the node that the walk stands at, and what is left there of p and q
        token = tree.tokens[:, i]
        chosen = (draft_probs[rows, at] == 0).all(axis=-1)
        this = jax.nn.one_hot(token, p.shape[-1], dtype=bool)
        drawn_from = jnp.where(chosen[:, None], this.astype(p.dtype), q)
        q_token = drawn_from[rows, token]
        tries = (tree.parents[:, i] == at) & (q_token > 0)
        u = uniforms[rows, jnp.minimum(tried, nodes - 2)]
        accepts = tries & (u * q_token < p[rows, token])
        rejects = (tries & ~accepts)[:, None]
        p = jnp.where(rejects, _normalised(jnp.maximum(p - drawn_from, 0), p), p)
        q = jnp.where(rejects, _normalised(jnp.where(this, 0, q), jnp.zeros_like(q)), q)
        p = jnp.where(accepts[:, None], probs[:, i], p)
        q = jnp.where(accepts[:, None], draft_probs[:, i], q)
        return jnp.where(accepts, i, at), p, q, tried + tries

    start = jnp.zeros(batch, jnp.int32), probs[:, 0], draft_probs[:, 0], jnp.zeros(batch, jnp.int32)
    # Children stand after their parents, so one pass over the nodes meets each in time.
    end, residual, _, _ = jax.lax.fori_loop(1, nodes, try_node, start)
    path = path_to(tree, tree.ancestors(), end)
    return Acceptance(path, length=_at(tree.depths, end), bonus=jnp.full(batch, -1, jnp.int32)), residual


def _normalised(
    weights: Float[Array, "batch vocab"], otherwise: Float[Array, "batch vocab"]
) -> Float[Array, "batch vocab"]:
    """The weights with a sum of 1; a row without any is that of `otherwise`."""
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), otherwise)


def accept_sampled(
    tree: Tree,
    logits: Float[Array, "batch nodes vocab"],
    keys: Key[Array, " batch"] | None,
    draft_probs: Float[Array, "batch nodes vocab"] | None = None,
) -> Acceptance:
    """`accept_sampling` as an accept_fn: the uniforms come from `keys`, and the bonus is drawn from the residual.

    With draft_probs, `accept_drawn`.
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
    """The greedy rule on logits + noise, which draws each token from softmax(logits) (the Gumbel-max trick).

    The token at each depth is a function of the target's logits and of that depth's noise, so whatever the tree holds,
    and even if it was drafted to maximise its own logits plus the same noise, the text is the same, and exactly
    distributed. Such a draft is accepted more often: in one step with one draft at least with probability
    (1 - d) / (1 + d), d the total variation distance between draft and target (Daliri, Musco and Suresh, "Coupling
    without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978; with several drafts, Rowan,
    Phan and Khisti, "List-Level Distribution Coupling", arXiv 2506.05632).

    Args:
      logits: processed.
      noise: standard Gumbel noise for the token after each depth.
    """
    at_depth = jax.vmap(lambda rows, depths: rows[depths])(noise, tree.depths)
    return accept_greedy(tree, logits + at_depth)


def choice_noise(keys: Key[Array, "*keys"], vocab_size: int) -> Float32[Array, "*keys {vocab_size}"]:
    """Standard Gumbel noise of every key: argmax(logits + noise) draws from softmax(logits)."""
    draw = functools.partial(jax.random.gumbel, shape=(vocab_size,), dtype=jnp.float32)
    flat = jax.vmap(lambda key: draw(jax.random.fold_in(key, 1)))(keys.reshape(-1))
    return flat.reshape(*keys.shape, vocab_size)


def argmax(x: Float[Array, "*axes vocab"]) -> Int32[Array, "*axes"]:
    """`jnp.argmax` over the last axis, int32, the first of equals; x has no NaN. A CPU runs it many times faster."""
    size = x.shape[-1]
    index = jnp.arange(size, dtype=jnp.int32).reshape((1,) * (x.ndim - 1) + (size,))
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, size - 1).min(axis=-1)


def _deepest(
    tree: Tree, agrees: Bool[Array, "batch nodes"]
) -> tuple[Int32[Array, " batch"], Int32[Array, "batch nodes"]]:
    """The deepest node, the first of equals, with `agrees` at it and all its ancestors but the root; and its path."""
    ancestors = tree.ancestors()
    agrees = agrees.at[:, 0].set(True)
    accepted = jnp.all(agrees[:, None, :] | ~ancestors, axis=-1)
    end = jax.lax.argmax(jnp.where(accepted, tree.depths, -1), 1, jnp.int32)
    return end, path_to(tree, ancestors, end)


def path_to(
    tree: Tree, ancestors: Bool[Array, "batch nodes nodes"], end: Int[Array, " batch"]
) -> Int32[Array, "batch nodes"]:
    """The nodes from the root to `end`, padded with PAD.

    In: parents [-1, 0, 0, 1, 3], end 4. Out: [0, 1, 3, 4, -1].
    """
    on_path = jnp.take_along_axis(ancestors, end[:, None, None], axis=1)  # [batch, 1, nodes]
    nodes = jnp.arange(tree.num_nodes, dtype=jnp.int32)
    at_depth = on_path & (tree.depths[:, None, :] == nodes[None, :, None])  # [batch, depth, nodes]
    return jnp.max(jnp.where(at_depth, nodes[None, None, :], PAD), axis=-1)


def _at(values: Shaped[Array, "batch nodes"], index: Int[Array, " batch"]) -> Shaped[Array, " batch"]:
    """One node's value of every row."""
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
