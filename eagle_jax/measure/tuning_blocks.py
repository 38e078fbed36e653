"""Tunes the depth and the tree of drafts that score all depths in one pass, such as DFlash, DSpark and P-EAGLE heads.

A block of another size has other logits, so each depth is observed by itself: cycles with a large tree of the depth.
Its best N nodes are the tree of N nodes that the same block would have grown. With the cost of each part of a cycle
that gives the expected tokens a second of every depth and number of nodes; see `tuning`.

Letters: D depth, N nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from eagle_jax.decode.state import DecodeState
from eagle_jax.drafts.protocol import Draft
from eagle_jax.drafts.registry import kind_of
from eagle_jax.measure import phases, tuning
from eagle_jax.measure.tuning import NODES, Expected, Seen
from eagle_jax.models.target import Target
from eagle_jax.tree import BestPrefixes

DEPTHS = (1, 2, 3, 5, 7, 11)  # and the deepest of the draft


@dataclasses.dataclass(frozen=True)
class BlockCosts:
    """Milliseconds of the parts of a cycle.

    plain: a plain decoding step. verify: a pass of the target and its logits, by nodes. block: drafting with the most
    nodes and the draft's update, by the depth of the tree. grow: drafting the deepest tree, by nodes. rest: acceptance,
    commit, bookkeeping.
    """

    plain: float
    verify: dict[int, float]
    block: dict[int, float]
    grow: dict[int, float]
    rest: float

    def cycle(self, tree: BestPrefixes) -> float:
        """Returns the milliseconds of a cycle with a tree whose sizes were measured.

        Fewer nodes make every level below the first cheaper by the same.
        """
        saved = self.grow[max(self.grow)] - self.grow[tree.num_nodes]
        levels = max(self.block) - 1
        drafting = self.block[tree.depth] - (saved * (tree.depth - 1) / levels if levels else 0.0)
        return self.verify[tree.num_nodes] + drafting + self.rest


def in_one_pass(draft: Draft | None) -> bool:
    """Returns whether a draft scores all depths in one pass, so that its kind's tree is the best prefixes."""
    kind = kind_of(draft)
    return kind is not None and isinstance(kind.tree, BestPrefixes)


def depths_for(draft: Any) -> tuple[int, ...]:
    """Returns the depths to try."""
    kind = kind_of(draft)
    assert kind is not None and kind.deepest is not None
    deepest = getattr(draft.config, kind.deepest)
    return (*(depth for depth in DEPTHS if depth < deepest), deepest)


def nodes_for(draft: Any) -> tuple[int, ...]:
    """Returns the numbers of nodes that the draft's vocabulary allows."""
    vocab = draft.config.draft_vocab_size or draft.config.vocab_size
    return tuple(count for count in NODES if count <= vocab)


def measure_costs(
    target: Target,
    draft: Draft,
    state: DecodeState,
    repeats: int,
    nodes: Sequence[int],
    depths: Sequence[int],
    progress: Callable[[], None] = lambda: None,
) -> BlockCosts:
    """Measures the costs of the next cycle of a greedy state.

    Args:
      state: prefilled with the draft, with room for phases.RUNS cycles.
      progress: called after each of `measurements(nodes, depths)` measurements.
    """
    plain, _ = phases.milliseconds(phases.cycles, repeats, target, None, state, tree=None)
    progress()
    verify, block, grow, rest = {}, {}, {}, 0.0
    for count in nodes:
        nodes_of, tree = tuning.star(state, count), BestPrefixes(depths[-1], count)
        verify[count], _ = phases.milliseconds(phases.verifications, repeats, target, draft, state, nodes_of)
        grow[count], _ = phases.milliseconds(phases.proposals, repeats, target, draft, state, tree=tree)
        progress()
    for depth in depths:
        tree = BestPrefixes(depth, nodes[-1])
        measured = phases.measure_phases(target, draft, tree, state, repeats)
        block[depth], rest = measured.draft, measured.rest
        progress()
    return BlockCosts(plain, verify, block, grow, rest)


def measurements(nodes: Sequence[int], depths: Sequence[int]) -> int:
    """Returns how many measurements `measure_costs` takes."""
    return 1 + len(nodes) + len(depths)


def expected_tokens(seen: Seen, nodes: int) -> float:
    """Estimates the tokens a cycle, bonus counted, of the best `nodes` nodes of the same block."""
    kept = tuning.best(seen.depths > 0, seen.scores, nodes - 1)
    return 1 + float((kept & seen.accepted).sum(axis=1).mean())


def expectations(seen: dict[int, Seen], costs: BlockCosts) -> list[Expected]:
    """Returns what to expect of every tree that can be a chain of its depth, the fastest first.

    Args:
      seen: by the depth of the tree.
    """
    found = []
    for depth, cycles in seen.items():
        for tree in (BestPrefixes(depth, count) for count in costs.verify if count > depth):
            found.append(Expected(tree, expected_tokens(cycles, tree.num_nodes), costs.cycle(tree)))
    return sorted(found, key=lambda expected: -expected.rate)
