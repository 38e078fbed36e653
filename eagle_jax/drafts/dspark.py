"""DSpark: a DFlash head that corrects a block's logits token by token (arXiv 2607.05147).

All logits of a block come from one pass, so none knows the tokens that are drafted before it. A Markov head adds a bias
for the token before. W1 [vocab, rank] and W2 [draft_vocab, rank] are low-rank matrices, h the output of the block:

    vanilla   W2 W1[token]
    gated     W2 (sigmoid(G [h, W1[token]]) * W1[token])
    rnn       W2 tanh(output), with a state along the path: state = gate * state + (1 - gate) * tanh(candidate),
              (gate, candidate, output) = J [state, W1[token], h], where gate goes through a sigmoid

A tree's nodes are corrected along their own paths. A block of n tokens drafts n (`from_root`): the output at the root
predicts the token after it, and the output at a mask token the one after that.

A confidence head predicts how likely a drafted token is to be accepted if those before it are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from eagle_jax.drafts.dflash import READ_OWN, DFlash, DFlashConfig, block_fields, flat_fields
from eagle_jax.drafts.noise import coupled
from eagle_jax.drafts.protocol import Context, Proposal
from eagle_jax.models.fields import ConfigError, flag
from eagle_jax.models.layers import add_bias, normal, zeros
from eagle_jax.models.target import Target
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.tree import DraftStep, TreePolicy

MARKOV_TYPES = ("vanilla", "gated", "rnn")
READ_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
NEUTRAL_OWN: dict[str, tuple[Any, ...]] = {"projector_type": ("dspark",), "is_causal": (False,)}


@dataclasses.dataclass(frozen=True)
class DSparkConfig(DFlashConfig):
    """The sizes of a DSpark head: those of a DFlash head, and of its two heads.

    markov_rank: 0 without a Markov head. markov_type: one of MARKOV_TYPES.
    confidence: whether there is a confidence head; confidence_with_markov: whether it reads W1[token], too.
    confidence_threshold: see `with_confidence`. Not part of a checkpoint.
    """

    _: dataclasses.KW_ONLY
    from_root: bool = True
    markov_rank: int = 0
    markov_type: str = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False
    confidence_threshold: float = 0.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json", **own: Any) -> DSparkConfig:
        """Reads the config.json of a head as its authors publish them, with the fields of the block at the top level.

        `target_layer_ids` names layers whose *output* is read, so a tap is an id + 1.

        Args:
          own: `own_embedding` and `own_lm_head`, from the checkpoint's tensor names.
        Raises:
          ConfigError: naming a field that is missing, contradicts another, or is not implemented.
        """
        flat = flat_fields(hf, where, (*READ_OWN, *READ_HEADS), NEUTRAL_OWN)
        rank, kind = flat.get("markov_rank"), flat.get("markov_head_type")
        if type(rank) is not int or rank < 0:
            raise ConfigError(f"{where}: markov_rank must be an integer, 0 without a Markov head, got {rank!r}")
        if rank and kind not in MARKOV_TYPES:
            accepted = ", ".join(MARKOV_TYPES)
            raise ConfigError(f"{where}: markov_head_type = {kind!r} is not implemented (accepted: {accepted})")
        confidence = flag(flat, "enable_confidence_head", where)
        with_markov = confidence and flag(flat, "confidence_head_with_markov", where)
        if with_markov and not rank:
            raise ConfigError(f"{where}: confidence_head_with_markov = True, but markov_rank is 0")
        return cls(
            **block_fields(flat, where, from_root=cls.from_root, **own),
            markov_rank=rank,
            markov_type=str(kind) if rank else "vanilla",
            confidence=confidence,
            confidence_with_markov=with_markov,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json as DSpark's authors publish them, which `from_hf` reads.

        Raises:
          ConfigError: naming what such a config cannot state.
        """
        hf = {"architectures": ["Qwen3DSparkModel"]} | self.layer_fields() | self.own_fields()
        dataclasses.replace(self, confidence_threshold=0.0).require_stated(hf)
        return hf

    def own_fields(self) -> dict[str, Any]:
        """Returns what a config.json states of the block and of its two heads, under the names that `from_hf` reads."""
        fields = super().own_fields() | {
            "markov_rank": self.markov_rank,
            "enable_confidence_head": self.confidence,
        }
        if self.markov_rank:
            fields["markov_head_type"] = self.markov_type
        if self.confidence:
            fields["confidence_head_with_markov"] = self.confidence_with_markov
        return fields


class MarkovHead(nnx.Module):
    """Makes a bias for the logits of the next token, from the token before it."""

    def __init__(self, config: DSparkConfig, key: Key[Array, ""], dtype: Any):
        rank, d = config.markov_rank, config.hidden_size
        keys = jax.random.split(key, 3)
        self.embed = nnx.Param(normal(keys[0], (config.vocab_size, rank), dtype))
        self.lm_head = Weight(normal(keys[1], (config.draft_vocab_size or config.vocab_size, rank), dtype))
        gated, joint = config.markov_type == "gated", config.markov_type == "rnn"
        self.gate = Weight(normal(keys[2], (rank, d + rank), dtype)) if gated else None
        self.gate_bias = zeros((rank,), dtype) if gated else None
        self.joint = Weight(normal(keys[2], (3 * rank, 2 * rank + d), dtype)) if joint else None
        self.joint_bias = zeros((3 * rank,), dtype) if joint else None

    def __call__(
        self,
        state: Float[Array, "batch nodes rank"],
        tokens: Int[Array, "batch nodes"],
        hidden: Float[Array, "batch 1 hidden"],
    ) -> tuple[Float32[Array, "batch nodes draft_vocab"], Float[Array, "batch nodes rank"]]:
        """Returns the bias after nodes of one depth, and the state that their children continue."""
        before = self.embed[tokens]
        hidden = jnp.broadcast_to(hidden, (*tokens.shape, hidden.shape[-1]))
        if self.gate is not None:
            gate = add_bias(linear(jnp.concatenate([hidden, before], axis=-1), self.gate), self.gate_bias)
            before = jax.nn.sigmoid(gate) * before
        elif self.joint is not None:
            mixed = add_bias(linear(jnp.concatenate([state, before, hidden], axis=-1), self.joint), self.joint_bias)
            gate, candidate, output = jnp.split(mixed, 3, axis=-1)
            gate = jax.nn.sigmoid(gate)
            state, before = gate * state + (1 - gate) * jnp.tanh(candidate), jnp.tanh(output)
        return linear(before, self.lm_head, jnp.float32), state


class DSpark(DFlash):
    """Drafts a block in one pass, and grows a tree from its logits, corrected along every path."""

    config: DSparkConfig

    def __init__(self, config: DSparkConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        """Initialises random weights."""
        super().__init__(config, key, dtype)
        keys = jax.random.split(jax.random.fold_in(key, 1))
        width = config.hidden_size + (config.markov_rank if config.confidence_with_markov else 0)
        self.markov = MarkovHead(config, keys[0], dtype) if config.markov_rank else None
        self.confidence = Weight(normal(keys[1], (1, width), dtype)) if config.confidence else None
        self.confidence_bias = zeros((1,), dtype) if config.confidence else None

    def confidences(
        self, tokens: Int[Array, "batch nodes"], hidden: Float[Array, "batch 1 hidden"]
    ) -> Float32[Array, "batch nodes"]:
        """Returns how likely a child of each node is to be accepted if the node is."""
        assert self.confidence is not None
        x = jnp.broadcast_to(hidden, (*tokens.shape, hidden.shape[-1]))
        if self.config.confidence_with_markov:
            assert self.markov is not None
            x = jnp.concatenate([x, self.markov.embed[tokens].astype(x.dtype)], axis=-1)
        return jax.nn.sigmoid(add_bias(linear(x, self.confidence, jnp.float32), self.confidence_bias)[..., 0])

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        """Grows a tree in which the candidates of a node depend on its depth and its token.

        Raises:
          ValueError: for a tree deeper than a block.
        """
        self.check_depth(tree)
        root, batch = context.root, len(context.root)
        size = tree.depth + self.first_output
        hidden = self.block_hidden(target, context.memory, root, size, context.prompt_lengths)[:, self.first_output :]
        logits, ids = self.logits(target, hidden), None if self.target_ids is None else self.target_ids[...]

        def after(state, tokens, depth):  # -> logits after nodes of this depth, [batch, nodes, draft_vocab], and state
            of_depth, output = (jax.lax.dynamic_index_in_dim(x, depth, axis=1) for x in (logits, hidden))
            if self.markov is not None:
                bias, state = self.markov(state, tokens, output)
                of_depth = of_depth + bias
            if self.config.confidence_threshold > 0 and self.confidence is not None:
                sure = self.confidences(tokens, output) >= self.config.confidence_threshold
                of_depth = jnp.where(sure[:, :, None], of_depth, -jnp.inf)
            return coupled(of_depth, context.sampling, noise, depth, ids), state

        def draft_fn(state, step: DraftStep):
            state = jnp.take_along_axis(state, step.parents[:, :, None], axis=1)
            return after(state, step.tokens, step.level + 1)

        none = jnp.zeros((batch, 1, self.config.markov_rank), self.dtype)
        first, state = after(none, root[:, None], 0)
        state = jnp.broadcast_to(state, (batch, tree.width, self.config.markov_rank))
        grown, _ = tree.grow(root, first[:, 0], state, draft_fn, ids)
        return Proposal(grown)


def with_confidence(draft: DSpark, threshold: float) -> DSpark:
    """Drafts nothing after a node whose confidence head finds acceptance less likely than `threshold`.

    The nodes that a tree saves there go elsewhere; a static tree keeps its shape. Changes no greedy text.

    Args:
      threshold: a probability; 0: drafts after every node.
    Raises:
      ConfigError: for a head without a confidence head, or a threshold that is no probability.
    """
    if not draft.config.confidence:
        raise ConfigError("this DSpark head has no confidence head, which a confidence threshold needs")
    if not 0 <= threshold <= 1:
        raise ConfigError(f"a confidence threshold is a probability, 0 to 1, got {threshold!r}")
    sure = copy.copy(draft)
    sure.config = dataclasses.replace(draft.config, confidence_threshold=float(threshold))
    return sure
