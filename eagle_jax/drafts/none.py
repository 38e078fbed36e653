"""NoDraft: plain decoding as a draft of depth 0. Its tree is the root alone; a cycle commits one token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from eagle_jax.drafts.protocol import Context, Draft, Proposal, check_models
from eagle_jax.models.target import Target
from eagle_jax.tree import Tree, TreePolicy


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoDraft(Draft):
    """Proposes no tokens. Public functions take None instead: see `as_draft`.

    Its memory is None; `update` returns another draft's memory unchanged.
    """

    def depth(self, tree: TreePolicy | None) -> int:
        return 0

    def start(self, target: Target, batch: int, rows: int) -> None:
        return None

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        return Proposal(Tree.root(context.root))


def as_draft(target: Any, draft: Draft | None) -> Draft:
    """Returns `NoDraft` for None, and any other draft unchanged.

    Raises:
      ValueError: naming the fix, if the target is no Target or the draft no Draft.
    """
    check_models(target, draft)
    return NoDraft() if draft is None else draft
