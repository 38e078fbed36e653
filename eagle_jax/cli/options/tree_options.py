"""Chooses the tree that a command decodes with: by its options, by what `eagle-jax tune` found, or by default."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from eagle_jax.cli import tuned
from eagle_jax.drafts.lookup_first import LookupFirst, without_lookup
from eagle_jax.drafts.registry import Kind, kind_of
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import BestExpansions, BestPrefixes, StaticTree, TreeConfig, TreePolicy
from eagle_jax.tree.named import describe_tree, tree_named

GROWTH = ("stop_below", "score_temperature")  # options of dynamic trees, by the names of TreeConfig
BATCH = 8  # texts at a time, the default of commands that decode many


def parse_tree(text: str) -> TreePolicy:
    """Parses a tree by `tree_named`; the type of an argparse option."""
    try:
        return tree_named(text)
    except (OSError, ValueError) as error:
        message = str(error) if text in str(error) else f"{text}: {error}"
        raise argparse.ArgumentTypeError(message) from error


@dataclasses.dataclass(frozen=True)
class TreeChoice:
    """Holds the tree to decode with, and its origin in words. Drafts with a fixed shape ignore the tree."""

    tree: TreePolicy
    origin: str

    def words(self, draft: Any) -> str:
        """Describes the draft, what it proposes, and where its tree comes from."""
        if draft is None:
            return "plain decoding"
        name = type(without_lookup(draft)).__name__
        if isinstance(draft, LookupFirst):
            name += f" and copies of {draft.length} tokens"
        return f"{name}, {describe_proposal(draft, self.tree)} ({self.origin})"

    def fields(self, draft: Any) -> Any:
        """Returns the tree as JSON values: its settings that are not 0, or its paths; None if the draft ignores it."""
        if has_own_shape(draft):
            return None
        ours = TreeConfig | StaticTree | BestPrefixes | BestExpansions
        fields = dataclasses.asdict(self.tree) if isinstance(self.tree, ours) else {}
        return {name: value for name, value in fields.items() if value} or repr(self.tree)


def choose_tree(draft: Any, args: argparse.Namespace, batch: int = 1) -> TreeChoice:
    """Chooses --tree with its options of growth; by default what `eagle-jax tune` found, or `default_tree`.

    Args:
      draft: None for plain decoding.
      batch: texts at a time: of several tuned trees the one of the nearest batch is taken.
    Raises:
      ValueError: for options of trees that this draft, or this tree, does not have.
    """
    if has_own_shape(draft):
        for name in ("tree", *GROWTH):
            if getattr(args, name, None) is not None:
                raise ValueError(f"{_option(name)} is for drafts that grow trees; {type(draft).__name__} does not")
        return TreeChoice(default_tree(draft), "a shape of its own")
    found = None if args.tree is None else (args.tree, "from --tree")
    if found is None:
        found = tuned.find(without_lookup(draft), tuned.folder_of(args), batch)
    tree, origin = found or (default_tree(draft), "the default")
    return TreeChoice(grown(tree, args), origin)


def choose_tree_for_many(draft: Any, args: argparse.Namespace, sampling: SamplingConfig) -> TreeChoice:
    """Chooses the tree of a command that decodes --batch texts at a time, none of which may depend on --batch.

    Greedy and coupled texts are the same with every tree. Other sampled texts depend on the tree, so they use the one
    that was tuned for the batch nearest to BATCH.
    """
    same_with_every_tree = sampling.temperature == 0 or sampling.coupled
    return choose_tree(draft, args, args.batch if same_with_every_tree else BATCH)


def grown(tree: TreePolicy, args: argparse.Namespace) -> TreePolicy:
    """Applies --stop-below and --score-temperature to a dynamic tree; raises ValueError for another tree."""
    changes = {name: value for name in GROWTH if (value := getattr(args, name, None)) is not None}
    if not changes:
        return tree
    if not isinstance(tree, TreeConfig):
        option = _option(next(iter(changes)))
        raise ValueError(f"{option} is for dynamic trees such as --tree 8,10,60, not for a {describe_tree(tree)}")
    return dataclasses.replace(tree, **changes)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_tree(draft: Any, kind: Kind | None = None) -> TreePolicy:
    """Returns the tree of the kind (default: the draft's own), cut off at the deepest that the draft can grow."""
    draft, kind = without_lookup(draft), kind or kind_of(draft)
    tree = TreeConfig() if kind is None or kind.tree is None else kind.tree
    if kind is None or kind.deepest is None:
        return tree
    deepest = getattr(draft.config, kind.deepest)
    if isinstance(tree, BestPrefixes):
        return dataclasses.replace(tree, depth=min(tree.depth, deepest))
    assert isinstance(tree, StaticTree)
    return StaticTree([path for path in tree.paths if len(path) <= deepest])


def has_own_shape(draft: Any) -> bool:
    """Returns whether a draft proposes a fixed shape and ignores the tree that it is asked for."""
    kind = kind_of(draft)
    return kind is not None and kind.tree is None


def describe_proposal(draft: Any, tree: TreePolicy) -> str:
    """Describes what a draft proposes: its tree, or the settings of its fixed shape; "" for plain decoding."""
    if has_own_shape(draft):
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(draft).items())
    return "" if draft is None else describe_tree(tree)
