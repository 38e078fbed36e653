"""Tunes trees: measures the cost of passes on this machine, and which nodes of a large tree the target accepts.

Letters: B batch, C cycles, N nodes, k top_k.

A large tree contains the smaller ones that the same draft would have grown. So cycles with one large tree show how many
tokens each smaller tree would have brought (`expected_tokens`). With the cost of each part of a cycle (`Costs`) that
gives the expected tokens a second of every tree. EAGLE-2's trees have one size for all machines (arXiv 2406.16858).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.decode.cycle import step
from eagle_jax.decode.prefill import pad, prefill
from eagle_jax.decode.state import DecodeState
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.drafts.protocol import Draft
from eagle_jax.measure import phases
from eagle_jax.models.target import Target
from eagle_jax.tree import BestPrefixes, Tree, TreeConfig, TreePolicy

NODES = (2, 4, 6, 8, 12, 16, 32, 64)
WIDTHS = (1, 2, 4, 8)
DEPTH = 8
TEMPERATURES = (1.0, 0.5, 0.33)


@dataclasses.dataclass(frozen=True)
class Seen:
    """The trees of C cycles, [C, N] each, as in `Tree`, and which of their nodes were accepted (the root always)."""

    parents: np.ndarray
    depths: np.ndarray
    scores: np.ndarray
    accepted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Costs:
    """Milliseconds of the parts of a cycle.

    plain: a plain decoding step. verify: a pass of the target and its logits, by nodes. level: a drafted level, by its
    nodes. draft: what drafting costs with any tree: the first level and the draft's update.
    rest: acceptance, commit, bookkeeping.
    """

    plain: float
    verify: dict[int, float]
    level: dict[int, float]
    draft: float
    rest: float

    def cycle(self, tree: TreeConfig) -> float:
        """Returns the milliseconds of a cycle with a tree whose sizes were measured."""
        return self.verify[tree.num_nodes] + self.draft + (tree.depth - 1) * self.level[tree.top_k] + self.rest


@dataclasses.dataclass(frozen=True)
class Expected:
    """Expected tokens and milliseconds a cycle of a tree."""

    tree: TreeConfig | BestPrefixes
    tokens: float
    ms: float

    @property
    def rate(self) -> float:
        """Tokens a second of one sequence."""
        return 1000 * self.tokens / self.ms


def widths_for(draft: EagleDraft) -> tuple[int, ...]:
    """Returns the widths that the draft's vocabulary allows."""
    return tuple(width for width in WIDTHS if width <= draft.config.draft_vocab_size)


def large_tree(widths: Sequence[int], temperature: float) -> TreeConfig:
    """Returns a tree of every drafted node, which contains the smaller trees of the same draft."""
    tree = TreeConfig(DEPTH, widths[-1], 2, score_temperature=temperature)
    return dataclasses.replace(tree, num_nodes=1 + tree.num_candidates)


def observe(
    target: Target, draft: Draft, prompts: Sequence[Sequence[int]], cycles: int, tree: TreePolicy, **options: Any
) -> Seen:
    """Decodes the prompts in one batch, for some cycles with a large tree.

    Args:
      options: sampling, key and stop_tokens, as in `generate`.
    """
    tokens, lengths = pad(prompts)
    room = cycles * (tree.depth + 1) + 1
    start = jax.jit(functools.partial(prefill, max_new_tokens=room, tree=tree, **options))
    state = start(target, draft, tokens, lengths)
    trees, paths, done = jax.device_get(_cycles(target, draft, state, tree=tree, cycles=cycles))
    nodes = np.arange(trees.tokens.shape[-1])
    accepted = (paths[..., None] == nodes).any(axis=-2)  # [C, B, N]
    return Seen(*(part[~done] for part in (trees.parents, trees.depths, trees.scores, accepted)))


@functools.partial(jax.jit, static_argnames=("tree", "cycles"))
def _cycles(target, draft, state, *, tree, cycles):
    def one(state, _):
        after = step(target, draft, state, tree=tree)
        return after.state, (after.tree, after.acceptance.path, state.done)

    return jax.lax.scan(one, state, length=cycles)[1]


def expected_tokens(seen: Seen, tree: TreeConfig) -> float:
    """Estimates the tokens a cycle, bonus counted, of a tree no larger than those seen.

    It assumes that cycles start at the same positions as with the large tree, and counts nodes missing from the large
    tree as rejected.
    """
    kept = smaller(seen, tree)
    return 1 + float((kept & seen.accepted).sum(axis=1).mean())


def smaller(seen: Seen, tree: TreeConfig) -> np.ndarray:
    """Returns, as [C, N] bool, which nodes of the large trees a smaller one of the same temperature would have kept.

    It proposes the children of rank below k of its k best nodes a level, down to its depth. Of these it keeps the best
    num_nodes - 1.
    """
    rank = sibling_rank(seen)
    expanded = seen.depths == 0
    proposed = np.zeros_like(expanded)
    for depth in range(1, tree.depth + 1):
        from_expanded = np.take_along_axis(expanded, np.maximum(seen.parents, 0), axis=1)
        level = (seen.depths == depth) & (rank < tree.top_k) & from_expanded
        proposed |= level
        expanded |= best(level, seen.scores, tree.top_k)
    return best(proposed, seen.scores, tree.num_nodes - 1)


def best(among: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Returns, as [C, N] bool, the `count` highest scores of the nodes `among` [C, N]; of equals the first."""
    order = np.argsort(np.where(among, -scores, np.inf), axis=1, kind="stable")
    chosen = np.zeros_like(among)
    np.put_along_axis(chosen, order[:, :count], True, axis=1)
    return chosen & among


def sibling_rank(seen: Seen) -> np.ndarray:
    """Counts, as [C, N], the earlier siblings of each node, which are those of higher probability."""
    nodes = np.arange(seen.parents.shape[1])
    return ((seen.parents[:, :, None] == seen.parents[:, None, :]) & (nodes[:, None] > nodes)).sum(axis=2)


def by_depth(seen: Seen) -> list[float]:
    """Returns how often a node of depth 1, 2, ... was accepted where its parent was."""
    reached = [(seen.accepted & (seen.depths == depth)).sum() for depth in range(seen.depths.max() + 1)]
    return [float(b / a) for a, b in itertools.pairwise(reached) if a]


def by_rank(seen: Seen) -> list[float]:
    """Returns the share of accepted nodes that were their parent's first, second, ... child."""
    taken = sibling_rank(seen)[seen.accepted & (seen.depths > 0)]
    return (np.bincount(taken) / max(len(taken), 1)).tolist()


def measure_costs(
    target: Target,
    draft: Draft,
    state: DecodeState,
    repeats: int,
    nodes: Sequence[int],
    widths: Sequence[int],
    progress: Callable[[], None] = lambda: None,
) -> Costs:
    """Measures the costs of the next cycle of a greedy state.

    Args:
      state: prefilled with the draft, with room for phases.RUNS cycles.
      progress: called after each of `measurements(nodes, widths)` measurements.
    """

    def ms(program, *args, **options):
        taken, result = phases.milliseconds(program, repeats, *args, **options)
        progress()
        return taken, result

    plain, _ = ms(phases.cycles, target, None, state, tree=None)
    verify = {count: ms(phases.verifications, target, draft, state, star(state, count))[0] for count in nodes}
    first, _ = ms(phases.proposals, target, draft, state, tree=TreeConfig(1, 1, 2))
    level = {}
    for width in widths:
        deep, _ = ms(phases.proposals, target, draft, state, tree=TreeConfig(6, width, width + 1))
        level[width] = max(deep - first, 0) / 5
    middle = TreeConfig(4, 2, 8)
    tree = star(state, middle.num_nodes)
    _, verified = phases.milliseconds(phases.verifications, 1, target, draft, state, tree)
    update, _ = ms(phases.updates, target, draft, state, tree, *verified, tree=middle)
    whole, _ = ms(phases.cycles, target, draft, state, tree=middle)
    costs = Costs(plain, verify, level, first + update, 0.0)
    if 8 not in nodes or 2 not in widths:
        return costs
    return dataclasses.replace(costs, rest=max(whole - costs.cycle(middle), 0.0))


def star(state: DecodeState, count: int) -> Tree:
    """Returns trees of a root and its children: the cost of a pass depends on the number of nodes alone."""
    node = jnp.broadcast_to(jnp.arange(count), (len(state.lengths), count))
    return Tree(node * 0, jnp.minimum(node, 1) - 1, jnp.minimum(node, 1), node * 0.0)


def measurements(nodes: Sequence[int], widths: Sequence[int] = WIDTHS) -> int:
    """Returns how many measurements `measure_costs` takes."""
    return 4 + len(nodes) + len(widths)


def trees(nodes: Sequence[int], widths: Sequence[int]) -> Iterator[TreeConfig]:
    """Yields every tree of these sizes with enough nodes for its depth and enough candidates for its nodes."""
    for depth in range(1, DEPTH + 1):
        for width in widths:
            for count in nodes:
                if depth < count <= 1 + width + (depth - 1) * width**2:
                    yield TreeConfig(depth, width, count)


def expectations(seen: dict[float, Seen], costs: Costs) -> list[Expected]:
    """Returns what to expect of every tree whose costs are known, the fastest first.

    Args:
      seen: by score temperature.
    """
    found = []
    for tree in trees(tuple(costs.verify), tuple(costs.level)):
        for temperature, cycles in seen.items():
            hot = dataclasses.replace(tree, score_temperature=temperature)
            found.append(Expected(hot, expected_tokens(cycles, hot), costs.cycle(hot)))
    return sorted(found, key=lambda expected: -expected.rate)


def of_each_size(expected: Sequence[Expected]) -> list[Expected]:
    """Returns the first tree of each number of nodes: the ones to try out.

    Verifying costs most, and its cost depends on the number of nodes alone. A wrong measurement of it misjudges all
    trees of that size, so the candidates differ in size.
    """
    first: dict[int, Expected] = {}
    for one in expected:
        first.setdefault(one.tree.num_nodes, one)
    return list(first.values())
