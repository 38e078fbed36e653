"""Trees by name, for command lines and settings files, and their descriptions."""

from __future__ import annotations

import json
from pathlib import Path

from eagle_jax.tree.best_expansions import BestExpansions
from eagle_jax.tree.best_prefixes import BestPrefixes
from eagle_jax.tree.dynamic import TreeConfig
from eagle_jax.tree.policy import TreePolicy
from eagle_jax.tree.published import PUBLISHED_TREES
from eagle_jax.tree.static import StaticTree

DEEPEST = 1000  # every level is a draft pass, and a chain's paths take memory quadratic in its depth


def tree_named(text: str) -> TreePolicy:
    """Returns the tree for "8,10,60", "chain:5", "best:15,64", "expand:15,4,64", a published name, or a JSON file.

    Raises:
      ValueError: for anything else; OSError: for a file that cannot be read.
    """
    kind, _, depth = text.partition(":")
    if kind == "chain" and depth.isdecimal() and int(depth):
        _check_depth(int(depth), text)
        return StaticTree.chain(int(depth))
    if kind == "best" and len(sizes := _sizes(depth)) == 2:
        _check_depth(sizes[0], text)
        return BestPrefixes(*sizes)
    if kind == "expand" and len(sizes := _sizes(depth)) == 3:
        _check_depth(sizes[0], text)
        return BestExpansions(*sizes)
    if text in PUBLISHED_TREES:
        return PUBLISHED_TREES[text]
    if Path(text).suffix == ".json":
        paths = json.loads(Path(text).read_text(encoding="utf-8"))
        if not isinstance(paths, list):
            raise ValueError(f"{text}: a list of paths was expected, such as [[0], [1], [0, 0]]")
        return StaticTree(paths)
    if len(sizes := _sizes(text)) == 3:
        _check_depth(sizes[0], text)
        return TreeConfig(*sizes)
    raise ValueError(
        f"a tree is depth,top_k,num_nodes, such as 8,10,60; or chain:5; or best:DEPTH,NODES; or "
        f"expand:DEPTH,TOP_K,NODES; or {', '.join(PUBLISHED_TREES)}; or a .json file of paths; got {text!r}"
    )


def describe_tree(tree: TreePolicy) -> str:
    """Returns a description such as "tree: depth 8, top_k 10, 60 nodes"."""
    if isinstance(tree, TreeConfig):
        more = f", stops below {tree.stop_below:g}" if tree.stop_below else ""
        more += f", score temperature {tree.score_temperature:g}" if tree.score_temperature != 1 else ""
        return f"tree: depth {tree.depth}, top_k {tree.top_k}, {tree.num_nodes} nodes{more}"
    if isinstance(tree, BestPrefixes):
        return f"the best {tree.num_nodes - 1} prefixes, depth {tree.depth}"
    if isinstance(tree, BestExpansions):
        return f"children of the best nodes: depth {tree.depth}, top_k {tree.top_k}, {tree.num_nodes} nodes"
    if tree.num_nodes == tree.depth + 1:
        return f"chain of {tree.depth}"
    return f"static tree: depth {tree.depth}, {tree.num_nodes} nodes"


def _sizes(text: str) -> list[int]:
    """Parses "8,10,60"; [] if that is not what it is."""
    sizes = text.split(",")
    return [int(size) for size in sizes] if all(size.strip().isdecimal() for size in sizes) else []


def _check_depth(depth: int, text: str) -> None:
    if depth > DEEPEST:
        raise ValueError(f"{text}: a tree may be {DEEPEST} levels deep at most")
