"""Static trees: the same shape in every cycle (EAGLE-1, arXiv 2401.15077; Medusa, arXiv 2401.10774, section 2.1.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eagle_jax.tree.policy import NEVER, DraftFn, DraftStep, best_children, step_mask
from eagle_jax.tree.tree import NO_PARENT, Tree

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree of fixed shape, given by the path of child ranks to every node, as in the official code.

    [0] and [1] are the root's most likely and second most likely child; [0, 0] is the most likely child of the former.
    Nodes are sorted by depth, then by path, so the order of the list does not matter.

    Raises:
      ValueError: for a path without its parent, a repeated path, or an invalid one; the message names it.
    """

    paths: tuple[Path, ...]

    def __init__(self, paths: Sequence[Sequence[int]]):
        for path in paths:
            if (
                not isinstance(path, list | tuple)
                or not path
                or not all(type(rank) is int and rank >= 0 for rank in path)
            ):
                raise ValueError(f"a path of a static tree is a list of child ranks such as [0, 2, 0], got {path!r}")
        if not paths:
            raise ValueError("a static tree needs at least one path; for plain decoding pass draft=None")
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        known = {()} | set(ordered)
        if len(known) != len(ordered) + 1:
            twice = next(path for path in ordered if ordered.count(path) > 1)
            raise ValueError(f"path {list(twice)} is twice in the static tree")
        for path in ordered:
            if path[:-1] not in known:
                raise ValueError(f"path {list(path)} of the static tree lacks its parent, {list(path[:-1])}")
        object.__setattr__(self, "paths", tuple(ordered))

    @classmethod
    def chain(cls, depth: int) -> StaticTree:
        """Returns the chain of standard speculative decoding: `depth` tokens, one a level."""
        return cls([[0] * length for length in range(1, depth + 1)])

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @property
    def num_nodes(self) -> int:
        return 1 + len(self.paths)

    @property
    def width(self) -> int:
        """The largest number of nodes of a level that have children, at least 1."""
        return max([1, *map(len, self.steps)])

    @property
    def ranks(self) -> int:
        """The highest child rank, plus 1."""
        return 1 + max(path[-1] for path in self.paths)

    @functools.cached_property
    def steps(self) -> list[list[Path]]:
        """The nodes that each drafting step expands: those of depth 1, 2, ..., depth - 1 that have children."""
        parents = sorted({path[:-1] for path in self.paths})
        return [[path for path in parents if len(path) == depth] for depth in range(1, self.depth)]

    @functools.cached_property
    def node_of(self) -> dict[Path, int]:
        """The index of each node; the root's path is ()."""
        return {(): 0} | {path: index for index, path in enumerate(self.paths, start=1)}

    @functools.cached_property
    def scored_at(self) -> tuple[int, ...] | None:
        """See FixedTreePolicy. None if a node's children skip a rank, as they are then not the first samples."""
        if any(path[-1] and (*path[:-1], path[-1] - 1) not in self.node_of for path in self.paths):
            return None
        row: dict[Path, int] = {(): 0}
        for level, paths in enumerate(self.steps):
            row |= {path: 1 + level * self.width + slot for slot, path in enumerate(paths)}
        return tuple(row.get(path, NEVER) for path in self.node_of)

    def grow(
        self,
        root: Int[Array, " batch"],
        logits: Float[Array, "batch draft_vocab"],
        carry: Any,
        draft_fn: DraftFn,
        target_ids: Int[Array, " draft_vocab"] | None = None,
    ) -> tuple[Tree, Any]:
        """Grows a tree whose node of path [..., r] is its parent's child of rank r.

        Args and Returns: as TreePolicy.grow.
        Raises:
          ValueError: if a rank exceeds the draft vocabulary.
        """
        batch, vocab = logits.shape
        if self.ranks > vocab:
            raise ValueError(f"rank {self.ranks - 1} of the static tree exceeds the draft vocabulary of {vocab} tokens")
        # [depth - 1, width]: for every node that a step expands, the index of its parent in the step before and its
        # rank; 0 where a step expands fewer. The step before the first holds the root.
        before: list[list[Path]] = [[()], *self.steps]
        slots, ranks = np.zeros((2, self.depth - 1, self.width), np.int32)
        for level, paths in enumerate(self.steps):
            slots[level, : len(paths)] = [before[level].index(path[:-1]) for path in paths]
            ranks[level, : len(paths)] = [path[-1] for path in paths]

        children = functools.partial(best_children, count=self.ranks, target_ids=target_ids)

        def expand(state, step):
            carry, mask, scores, tokens = state  # scores, tokens [batch, width, ranks]: children of the step before
            level, slots, ranks = step
            tokens, scores = tokens[:, slots, ranks], scores[:, slots, ranks]
            parents = jnp.broadcast_to(slots, (batch, self.width))
            mask = step_mask(mask, parents, level)
            logits, carry = draft_fn(carry, DraftStep(tokens, parents, mask, level))
            scores, tokens = children(logits, scores)
            return (carry, mask, scores, tokens), (scores, tokens)

        first = tuple(
            jnp.broadcast_to(values, (batch, self.width, self.ranks))
            for values in children(logits[:, None], jnp.zeros((batch, 1), jnp.float32))
        )
        grown = tuple(values[None] for values in first)
        if self.depth > 1:  # a scan of length 0 would still trace draft_fn
            mask = jnp.zeros((batch, self.width, (self.depth - 1) * self.width), bool)
            tables = (jnp.arange(self.depth - 1, dtype=jnp.int32), jnp.array(slots), jnp.array(ranks))
            (carry, *_), more = jax.lax.scan(expand, (carry, mask, *first), tables)
            grown = tuple(jnp.concatenate(pair) for pair in zip(grown, more, strict=True))
        return self._tree(root, *grown), carry

    def _tree(
        self,
        root: Int[Array, " batch"],
        scores: Float[Array, "depth batch width ranks"],
        tokens: Int[Array, "depth batch width ranks"],
    ) -> Tree:
        """Makes the tree from the scores and tokens of every step's children."""
        before: list[list[Path]] = [[()], *self.steps]
        # Index of every node but the root along the first, third and last axis of scores and tokens.
        levels = np.array([len(path) - 1 for path in self.paths], np.int32)
        places = np.array([before[len(path) - 1].index(path[:-1]) for path in self.paths], np.int32)
        ranks = np.array([path[-1] for path in self.paths], np.int32)

        def nodes(values):
            return jnp.moveaxis(values, 1, 0)[:, levels, places, ranks]

        def each_row(values):
            return jnp.broadcast_to(jnp.array(values, jnp.int32), (root.shape[0], self.num_nodes))

        return Tree(
            tokens=jnp.concatenate([root[:, None], nodes(tokens)], axis=1).astype(jnp.int32),
            parents=each_row([NO_PARENT, *(self.node_of[path[:-1]] for path in self.paths)]),
            depths=each_row([0, *map(len, self.paths)]),
            scores=jnp.concatenate([jnp.zeros((root.shape[0], 1), jnp.float32), nodes(scores)], axis=1),
        )
