"""The draft protocol: what decoding asks of a draft. The extension point for your own drafts.

In every cycle the draft proposes a tree from a `Context`, the target verifies it, and `update` gets the newly committed
positions. The draft keeps a `memory` between cycles. Prompts pass through `update` as well, in chunks.

Any tree is safe: a proposal changes how many tokens a cycle commits, never which.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

from eagle_jax.models.target import Target, TargetOutput, missing_members
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import Tree, TreePolicy


class Proposal(NamedTuple):
    """A tree, and the distribution that it was sampled from.

    probs: the draft distribution q at every node, if children were sampled from it without replacement into a tree of
      fixed shape (zeros for a node without children). None if they were selected deterministically. `accept_drawn` uses
      q to accept more.
    """

    tree: Tree
    probs: Float32[Array, "batch nodes vocab"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a draft may read when it proposes.

    tokens: each prompt and its new tokens, zero-padded.
    lengths: prompt and new tokens so far.
    root: the last token of each sequence, chosen by the target but not yet run: the root of the tree.
    root_position: its position.
    memory: the result of `start` or of the latest `update`.
    keys: of the sequences; None in the greedy program. Derive keys for the draft's draws by `keys.draft_keys`.
    sampling: of each sequence, fields [batch]; None in the greedy program.
    noise: the Gumbel noise that the target will choose the token after each depth by; None unless sampling is coupled.
    """

    tokens: Int32[Array, "batch buffer"]
    lengths: Int32[Array, " batch"]
    prompt_lengths: Int32[Array, " batch"]
    root: Int32[Array, " batch"]
    root_position: Int32[Array, " batch"]
    memory: Any
    keys: Key[Array, " batch"] | None
    sampling: SamplingConfig | None
    noise: Float32[Array, "batch path vocab"] | None

    @property
    def draft(self) -> Any:
        """The former name of `memory`."""
        return self.memory


@dataclasses.dataclass(frozen=True)
class Committed:
    """Newly committed positions: those from `start` that the target has run, of which the first `count` are valid.

    Later entries hold arbitrary values.

    tokens, next_tokens: the token at each position and the one after it. The last valid position is followed by the
      root, which the target has chosen and not yet run.
    count: may be 0.
    output: of the target at these positions: hidden states, and taps if the draft asked for them.
    tree, logits: the verified tree, and the target's logits after every node, accepted or not. None for a prompt, which
      is committed in chunks.
    """

    tokens: Int32[Array, "batch new"]
    next_tokens: Int32[Array, "batch new"]
    start: Int32[Array, " batch"]
    count: Int32[Array, " batch"]
    output: TargetOutput
    prompt_lengths: Int32[Array, " batch"]
    tree: Tree | None = None
    logits: Float[Array, "batch nodes vocab"] | None = None


Text = Committed  # the former name, which drafts of users import


class Draft:
    """Base class of drafts: a pytree, with its weights as leaves, that implements at least `propose`.

    All methods are traced: shapes may depend on the draft's settings and on `tree` only. A sequence's proposal may
    depend on that sequence only, so that its text does not depend on the rest of the batch.
    """

    @property
    def reusable(self) -> bool:
        """Whether the memory of a shared prefix can be reused under a different continuation.

        False where RoPE depends on the prompt's length.
        """
        return True

    def check_fits(self, target: Target) -> None:
        """Raises ConfigError, naming both numbers, if the draft was not made for a target of this shape."""

    def depth(self, tree: TreePolicy) -> int:
        """Returns the depth of the proposed trees. Drafts with a fixed tree ignore `tree`."""
        return tree.depth

    def taps(self, target: Target) -> tuple[int, ...]:
        """Returns the target layers whose input `update` reads; index n is the output of the last of n layers."""
        return ()

    def start(self, target: Target, batch: int, rows: int) -> Any:
        """Returns the memory before any text: a pytree of arrays, each with the batch as its first axis.

        Args:
          rows: positions to allocate, which include scratch for depth + 1 positions beyond the longest text.
        """
        return ()

    def update(self, target: Target, memory: Any, committed: Committed) -> Any:
        """Updates the memory with newly committed positions.

        Sequences whose count is 0 must stay unchanged up to their length; anything beyond it may be overwritten.
        """
        return memory

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        """Returns a tree of guesses under `context.root`.

        Args:
          noise: `context.noise`, shared with the target if sampling is coupled (see `accept_coupled`). Ignoring it only
            lowers acceptance.
        """
        raise NotImplementedError(f"{type(self).__name__} is no draft: it lacks propose")


def check_models(target: Any, draft: Any) -> None:
    """Raises ValueError, naming the fix, if the target is no Target or the draft no Draft."""
    if isinstance(target, Draft):
        raise ValueError(f"target is a draft, {shown(target)}; pass the target first, then the draft")
    if missing := missing_members(target):
        lacks = f", which lacks {', '.join(missing)}" if hasattr(target, "config") else ""
        raise ValueError(
            "target must be a Llama, such as eagle_jax.load and from_pretrained give, or another Target; got "
            f"{shown(target)}{lacks}"
        )
    if draft is None or isinstance(draft, Draft):
        return
    if not missing_members(draft):
        raise ValueError(
            f"draft is {shown(draft)}; to draft with a smaller model, wrap it: eagle_jax.DraftModel(draft)"
        )
    if isinstance(draft, type) and issubclass(draft, Draft):
        raise ValueError(f"draft is the class {draft.__name__}; pass an instance of it")
    if isinstance(draft, str | os.PathLike):
        raise ValueError(f"draft is a path; load it: eagle_jax.load_draft({os.fspath(draft)!r}, target)")
    raise ValueError(
        f"draft must be a Draft (an EAGLE head, Medusa, DraftModel, PromptLookup, ...) or None; got {shown(draft)}"
    )


def shown(value: Any) -> str:
    """Formats a value for an error message; the repr of a model or an array may take megabytes."""
    if value is None or isinstance(value, str | int | float):
        return reprlib.repr(value)
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"
