"""Trees by name, for command lines and settings files."""

from __future__ import annotations

import json
from pathlib import Path

from eagle_jax.tree.grow import TreeConfig
from eagle_jax.tree.policy import TreePolicy
from eagle_jax.tree.published import PUBLISHED_TREES
from eagle_jax.tree.static import StaticTree

DEEPEST = 1000  # a chain's paths take memory by the square of its depth, and every level of a tree is a pass


def tree_named(text: str) -> TreePolicy:
    """A tree from "8,10,60", "chain:5", the name of a published one, or a JSON file of paths.

    Raises:
      ValueError: for anything else; OSError: for a file that cannot be read.
    """
    kind, _, depth = text.partition(":")
    if kind == "chain" and depth.isdecimal() and int(depth):
        _check_depth(int(depth), text)
        return StaticTree.chain(int(depth))
    if text in PUBLISHED_TREES:
        return PUBLISHED_TREES[text]
    if Path(text).suffix == ".json":
        paths = json.loads(Path(text).read_text(encoding="utf-8"))
        if not isinstance(paths, list):
            raise ValueError(f"{text}: a list of paths was expected, such as [[0], [1], [0, 0]]")
        return StaticTree(paths)
    sizes = text.split(",")
    if len(sizes) == 3 and all(size.strip().isdecimal() for size in sizes):
        _check_depth(int(sizes[0]), text)
        return TreeConfig(*map(int, sizes))
    raise ValueError(
        f"a tree is depth,top_k,num_nodes, such as 8,10,60; or chain:5; or {', '.join(PUBLISHED_TREES)}; or a .json "
        f"file of paths; got {text!r}"
    )


def _check_depth(depth: int, text: str) -> None:
    if depth > DEEPEST:
        raise ValueError(f"{text}: a tree may be {DEEPEST} levels deep at most")
