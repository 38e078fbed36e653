"""Tunes the block and the tree of drafts that write a block in one pass, such as a DFlash head.

A block of another size has other logits, so each size is observed by itself: cycles with a large tree of the block. Its
best N nodes are the tree of N nodes that the same block would have grown. With the cost of each part of a cycle that
gives the expected tokens a second of every block and number of nodes; see `tuning`.

Letters: N nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from eagle_jax.decode.state import DecodeState
from eagle_jax.drafts.dflash import DFlash
from eagle_jax.measure import phases, tuning
from eagle_jax.measure.tuning import NODES, Expected, Seen
from eagle_jax.models.target import Target
from eagle_jax.tree import BestPrefixes

DEPTHS = (1, 2, 3, 5, 7, 11)  # and the deepest of the draft


@dataclasses.dataclass(frozen=True)
class BlockCosts:
    """Milliseconds of the parts of a cycle.

    plain: a plain decoding step. verify: a pass of the target and its logits, by nodes. block: drafting and the draft's
    update, by the depth of the tree. rest: acceptance, commit, bookkeeping.
    """

    plain: float
    verify: dict[int, float]
    block: dict[int, float]
    rest: float

    def cycle(self, tree: BestPrefixes) -> float:
        """Returns the milliseconds of a cycle with a tree whose sizes were measured."""
        return self.verify[tree.num_nodes] + self.block[tree.depth] + self.rest


def depths_for(draft: DFlash) -> tuple[int, ...]:
    """Returns the depths to try: one less than the tokens of a block."""
    deepest = draft.config.deepest
    return (*(depth for depth in DEPTHS if depth < deepest), deepest)


def nodes_for(draft: DFlash) -> tuple[int, ...]:
    """Returns the numbers of nodes that the vocabulary allows."""
    return tuple(count for count in NODES if count <= draft.config.vocab_size)


def measure_costs(
    target: Target,
    draft: DFlash,
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
    verify, block, rest = {}, {}, 0.0
    for count in nodes:
        nodes_of = tuning.star(state, count)
        verify[count], _ = phases.milliseconds(phases.verifications, repeats, target, draft, state, nodes_of)
        progress()
    for depth in depths:
        tree = BestPrefixes(depth, nodes[-1])
        measured = phases.measure_phases(target, draft, tree, state, repeats)
        block[depth], rest = measured.draft, measured.rest
        progress()
    return BlockCosts(plain, verify, block, rest)


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
