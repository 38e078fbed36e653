"""DraftModel: standard speculative decoding with a smaller model (arXiv 2211.17192, 2302.01318)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.drafts.noise import perturbed
from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal
from eagle_jax.keys import draft_keys
from eagle_jax.models.cache import ROW_TILE, KVCache, put
from eagle_jax.models.config import require_same
from eagle_jax.models.target import Target
from eagle_jax.ops.arrays import take_one
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN
from eagle_jax.sampling import SamplingConfig, warp
from eagle_jax.tree import DraftStep, Tree, TreePolicy, choice_noise
from eagle_jax.tree.policy import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelMemory:
    """The small model's cache of the whole text, the root included, and its hidden state at the root."""

    cache: KVCache
    hidden: Float[Array, "batch hidden"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel(Draft):
    """Drafts with a smaller model of the same vocabulary.

    The tree is a chain (`StaticTree.chain(5)`), another static tree, or a dynamic one (TreeConfig).

    In sampled sequences, the children of a FixedTreePolicy's nodes (StaticTree is one) are sampled from the small
    model's processed distribution q, and `accept_drawn` applies. Dynamic trees, and greedy sequences, use top-k tokens;
    those are not samples from q, so `accept_sampling` applies.
    """

    model: Target

    @property
    def reusable(self) -> bool:
        return not self.model.config.rope.by_length

    def check_fits(self, target: Target) -> None:
        require_same("vocab_size", self.model.config.vocab_size, target.config.vocab_size)

    def start(self, target: Target, batch: int, rows: int) -> ModelMemory:
        config, dtype = self.model.config, self.model.dtype
        # One more tile, as `update` writes one position more than the target does.
        cache = KVCache.zeros(config, batch, rows + ROW_TILE, dtype)
        return ModelMemory(cache, jnp.zeros((batch, config.hidden_size), dtype))

    def update(self, target: Target, memory: ModelMemory, committed: Committed) -> ModelMemory:
        """Runs the small model up to the root.

        Re-runs the token at `start`, so that the first update needs no special case.
        """
        tokens = jnp.concatenate([committed.tokens[:, :1], committed.next_tokens], axis=1)
        batch, width = tokens.shape
        mask = jnp.broadcast_to(jnp.tri(width, dtype=bool), (batch, width, width))
        out = self.model(
            tokens,
            committed.start[:, None] + jnp.arange(width, dtype=jnp.int32)[None],
            mask,
            prompt_lengths=committed.prompt_lengths,
            cache=memory.cache.with_length(committed.start),
            in_blocks=committed.tree is None and width > 2,
        )
        return ModelMemory(
            cache=memory.cache.write(out.new_kv, committed.start),
            hidden=jnp.where((committed.count > 0)[:, None], take_one(out.hidden, committed.count), memory.hidden),
        )

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        memory: ModelMemory = context.memory
        past = memory.cache.with_length(context.lengths)
        root = context.root
        batch, k, config = root.shape[0], tree.width, self.model.config
        shape = (batch, config.num_kv_heads, (tree.depth - 1) * k, config.head_dim)
        scratch = [(jnp.zeros(shape, self.model.dtype),) * 2 for _ in range(config.num_layers)]

        scored_at = None if context.sampling is None or noise is not None else _scored_at(tree)
        if scored_at is not None:
            # Gumbel top-k: the k largest of logits + noise are k samples without replacement.
            assert context.keys is not None
            noise = choice_noise(draft_keys(context.keys, context.lengths, tree.depth), config.vocab_size)

        guesses = functools.partial(_guesses, sampling=context.sampling, noise=noise, drawn=scored_at is not None)

        def draft_fn(carry, step: DraftStep):
            scratch, probs = carry
            positions = jnp.broadcast_to((context.lengths + step.level)[:, None], step.tokens.shape)

            def attend(index, q, k, v, spec=PLAIN):
                place = (0, 0, step.level * tree.width, 0)
                old_k, old_v = scratch[index]
                rows = put(old_k, k, place), put(old_v, v, place)
                # A window limits cached positions; drafted nodes see all their ancestors.
                old = past.layer(index)
                return attention(q, *rows, step.mask, old, spec=spec, positions=positions, limit_new=False), rows

            out, written = self.model.run(step.tokens, positions, attend, prompt_lengths=context.prompt_lengths)
            logits, q = guesses(step.level + 1, self.model.logits(out.hidden))
            probs = put(probs, q, (0, 1 + step.level * tree.width, 0))
            return logits, (written, probs)

        logits, first = guesses(0, self.model.logits(memory.hidden[:, None]))
        probs = jnp.zeros((batch, 1 + (tree.depth - 1) * k, first.shape[-1]), jnp.float32).at[:, :1].set(first)
        grown, (_, probs) = tree.grow(root, logits[:, 0], (scratch, probs), draft_fn)
        return Proposal(grown) if scored_at is None else _drawn(grown, scored_at, probs)


def _guesses(
    depth: int | Int[Array, ""],
    logits: Float[Array, "batch width vocab"],
    sampling: SamplingConfig | None,
    noise: Float[Array, "batch path vocab"] | None,
    drawn: bool,
) -> tuple[Float[Array, "batch width vocab"], Float32[Array, "batch width vocab_or_0"]]:
    """Returns logits plus noise, and q: zeros in greedy sequences, of width 0 if children are not sampled."""
    nothing = jnp.zeros((*logits.shape[:2], 0), jnp.float32)
    if noise is None or sampling is None:
        return logits, nothing
    warped = warp(logits, sampling)
    noisy = perturbed(logits, warped, sampling, noise, depth)
    if not drawn:
        return noisy, nothing
    sampled = (sampling.temperature > 0).reshape(-1, 1, 1)
    return noisy, jnp.where(sampled, jax.nn.softmax(warped, axis=-1), 0)


def _scored_at(tree: TreePolicy) -> Int[np.ndarray, " nodes"] | None:
    """Returns `FixedTreePolicy.scored_at`; None if the tree's shape is not fixed.

    Raises:
      ValueError: if its numbers do not fit the tree.
    """
    scored_at = getattr(tree, "scored_at", None)
    if scored_at is None:
        return None
    rows, end = np.array(scored_at, np.int32), 1 + (tree.depth - 1) * tree.width
    if rows.shape != (tree.num_nodes,) or rows[0] != 0 or rows.min() < NEVER or rows.max() >= end:
        raise ValueError(
            f"scored_at of a {type(tree).__name__} must hold a number for each of its {tree.num_nodes} nodes: 0 for "
            f"the root first, {NEVER} to {end - 1} for the others"
        )
    return rows


def _drawn(grown: Tree, row: Int[np.ndarray, " nodes"], probs: Float32[Array, "batch scored vocab"]) -> Proposal:
    """Returns the proposal with q, and scores under q; greedy sequences, whose q is 0, retain the tree's scores.

    Args:
      row: for each node, the entry of `probs` at which its children were scored.
      probs: q at the root, then at the nodes of every drafting step.
    """
    at_nodes = jnp.where((row >= 0)[None, :, None], probs[:, np.maximum(row, 0)], 0)  # [batch, nodes, vocab]
    batch, nodes = grown.tokens.shape
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    log_q = jnp.log(at_nodes[rows, jnp.maximum(grown.parents, 0), grown.tokens])
    on_path = grown.ancestors() & (jnp.arange(nodes, dtype=jnp.int32) > 0)[None, None]
    scores = jnp.where(on_path, log_q[:, None], 0).sum(axis=-1)
    chosen = (at_nodes[:, 0] == 0).all(axis=-1, keepdims=True)
    return Proposal(dataclasses.replace(grown, scores=jnp.where(chosen, grown.scores, scores)), at_nodes)
