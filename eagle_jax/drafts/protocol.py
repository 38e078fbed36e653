"""Draft: what the decoder asks of whatever guesses the target's next tokens.

A cycle asks the draft to `propose` a tree from a `Context`, lets the target verify it, and calls `update` with the
newly committed positions. Between cycles the draft keeps a `memory`. A prompt comes through `update`, too, in chunks.

Any tree is safe: what a draft proposes changes how many tokens a cycle brings, never which.
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
    """What a draft may read when it proposes: the text so far, its own memory, and how tokens will be sampled.

    tokens: each prompt and its new tokens, then zeros.
    lengths: prompt and new tokens so far.
    root: the last token of each text, chosen by the target but not yet run: the root of the tree.
    root_position: its index in the text.
    memory: what `start` or the latest `update` returned.
    keys: of the sequences; None in the greedy program. See `keys.draft_keys` for a draft's own draws.
    sampling: of each sequence, fields [batch]; None in the greedy program.
    noise: the Gumbel noise by which the target will choose the token after each depth; None unless sampling is coupled.
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
        """Another name of `memory`."""
        return self.memory


@dataclasses.dataclass(frozen=True)
class Committed:
    """Newly committed positions: positions from `start` that the target has run, the first `count` of them valid.

    Positions past the count hold anything.

    tokens, next_tokens: the token at each position and the one after it. After the last valid one comes the root, the
      token that the target chose and has not run yet.
    count: may be 0.
    output: the target's pass there: hidden states, and taps if the draft asked for them.
    tree, logits: the verified tree, and the target's logits after every node, accepted or not. None for a prompt, of
      which up to a chunk's length is committed at a time.
    """

    tokens: Int32[Array, "batch new"]
    next_tokens: Int32[Array, "batch new"]
    start: Int32[Array, " batch"]
    count: Int32[Array, " batch"]
    output: TargetOutput
    prompt_lengths: Int32[Array, " batch"]
    tree: Tree | None = None
    logits: Float[Array, "batch nodes vocab"] | None = None


Text = Committed  # the name by which drafts of users import it


class Draft:
    """A draft: a pytree (its weights, if any, are leaves) whose one necessary method is `propose`.

    Everything runs in a trace: shapes may depend on the draft's own settings and on `tree` only. A row's proposal may
    depend on that row alone, so that its text does not depend on its neighbours.
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
        """The most tokens that a proposal can get accepted. Drafts with a shape of their own ignore `tree`."""
        return tree.depth

    def taps(self, target: Target) -> tuple[int, ...]:
        """The target's layers whose input `update` reads (n: the last one's output)."""
        return ()

    def start(self, target: Target, batch: int, rows: int) -> Any:
        """The memory before any text: a pytree of arrays, each with the batch as its first axis.

        Args:
          rows: the most positions of a text, with room for a tree's depth + 1 beyond its end.
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
          noise: `context.noise`, shared with the target if sampling is coupled (see `accept_coupled`). A draft may
            ignore it.
        """
        raise NotImplementedError(f"{type(self).__name__} is no draft: it lacks propose")


def check_models(target: Any, draft: Any) -> None:
    """Raises ValueError, naming the fix, for what is no target or no draft."""
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
    """A value in a message: itself where it is short; a model's or an array's repr may be megabytes."""
    if value is None or isinstance(value, str | int | float):
        return reprlib.repr(value)
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"
