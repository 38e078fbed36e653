"""Drafts by name, for the commands that compare or show several: plain, lookahead, medusa=DIR, eagle3, ..."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from eagle_jax.cli.models import Models, default_tree, describe_tree, for_this_machine, parse_tree
from eagle_jax.convert import load_draft
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle import EagleDraft, with_window
from eagle_jax.drafts.lookahead import Lookahead
from eagle_jax.drafts.medusa import Medusa
from eagle_jax.drafts.prompt_lookup import PromptLookup
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models.eagle1 import Eagle1Draft
from eagle_jax.models.eagle3 import Eagle3Draft
from eagle_jax.tree import PUBLISHED_TREES, TreePolicy


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way of decoding: plain if draft is None, which needs no tree."""

    name: str
    draft: Draft | None
    tree: TreePolicy

    @property
    def shape(self) -> str:
        """What it proposes, in words."""
        if self.draft is None:
            return ""
        if isinstance(self.draft, Lookahead | PromptLookup):
            return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.draft).items())
        return describe_tree(self.tree)


@dataclasses.dataclass(frozen=True)
class _Name:
    """weightless: makes the draft; else kind: the class a checkpoint must hold. tree: the default; None: --tree."""

    weightless: Callable[[], Draft] | None = None
    kind: type[Draft] | None = None
    tree: Callable[[Any], TreePolicy] | None = None


NAMES = {
    "plain": _Name(),
    "lookahead": _Name(weightless=Lookahead),
    "prompt-lookup": _Name(weightless=PromptLookup),
    "prompt-lookup-tree": _Name(weightless=lambda: PromptLookup(branches=4)),
    "model": _Name(kind=DraftModel, tree=default_tree),
    "medusa": _Name(kind=Medusa, tree=default_tree),
    "eagle1": _Name(kind=Eagle1Draft, tree=lambda draft: PUBLISHED_TREES["eagle"]),
    "eagle2": _Name(kind=Eagle1Draft),
    "eagle3": _Name(kind=Eagle3Draft),
}
SAME_WEIGHTS = {"eagle1": "eagle2", "eagle2": "eagle1"}
# Heads of the embedded pair.
EMBEDDED = {"eagle1": "head_eagle1", "eagle2": "head_eagle1", "eagle3": "head"}

SPEC_HELP = (
    "ways to decode, in this order: " + ", ".join(NAMES) + ". Those with weights take the model's own head if it is of "
    "their kind, or NAME=DIR_OR_ID; eagle1 is the static tree and eagle2 the dynamic one of the same head"
)


def embedded_pair() -> Path:
    """The folder of the embedded pair."""
    return Path(str(resources.files("eagle_jax") / "pair"))


def parse_specs(text: str) -> dict[str, str | None]:
    """{name: folder or hub id, or None} from "plain,medusa=DIR,eagle3"; the type of an argparse option."""
    specs: dict[str, str | None] = {}
    for spec in text.split(","):
        name, _, source = spec.strip().partition("=")
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"unknown draft {name!r}; known: {', '.join(NAMES)}")
        if name in specs:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
        if source and NAMES[name].kind is None:
            raise argparse.ArgumentTypeError(f"{name} has no weights, so {name}={source} means nothing")
        specs[name] = source or None
    return specs


def parse_draft_tree(text: str) -> tuple[str, TreePolicy]:
    """("eagle1", tree) from "eagle1=TREE"; the type of an argparse option."""
    name, _, tree = text.partition("=")
    if name not in NAMES or NAMES[name].kind is None:
        grown = [name for name, known in NAMES.items() if known.kind is not None]
        raise argparse.ArgumentTypeError(f"{text!r}: trees are for {', '.join(grown)}, such as eagle1=paths.json")
    return name, parse_tree(tree)


def candidates(
    models: Models,
    specs: dict[str, str | None],
    tree: TreePolicy,
    trees: dict[str, TreePolicy] | None = None,
    embedded: bool = False,
    window: tuple[int, int] | None = None,
) -> list[Candidate]:
    """The drafts that the specs name, made for the target.

    Args:
      tree: of the dynamic ones. trees: of single ones, instead of their own.
      embedded: whether the target is the embedded pair's, which has heads of its own for some names.
      window: --draft-window, of the EAGLE heads that are loaded here.
    Raises:
      ValueError: for a draft with weights whose folder is not named. CheckpointError, ConfigError: as `load_draft`.
    """
    loaded: dict[str, Draft] = {}

    def weights(name: str, kind: type[Draft]) -> Draft:
        source = specs.get(name) or specs.get(SAME_WEIGHTS.get(name, ""))
        if source is None and embedded and name in EMBEDDED:
            source = str(embedded_pair() / EMBEDDED[name])
        if source is None:
            if isinstance(models.draft, kind):
                return models.draft
            raise ValueError(f"{name} needs weights that this model has not; name them: {name}=DIR_OR_ID")
        if source not in loaded:
            draft = for_this_machine(load_draft(source, models.target))
            loaded[source] = with_window(draft, *window) if window and isinstance(draft, EagleDraft) else draft
        if not isinstance(loaded[source], kind):
            raise ValueError(f"{name}={source}: holds a {type(loaded[source]).__name__}, not a {kind.__name__}")
        return loaded[source]

    found = []
    for name in specs:
        known = NAMES[name]
        draft = known.weightless() if known.weightless else weights(name, known.kind) if known.kind else None
        own = tree if known.tree is None else known.tree(draft)
        found.append(Candidate(name, draft, (trees or {}).get(name, own)))
    return found
