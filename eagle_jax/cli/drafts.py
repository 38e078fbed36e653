"""Drafts by name, for the commands that compare or show several: plain, lookahead, medusa=DIR, eagle3, ..."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eagle_jax.cli.models import WEIGHTLESS, Models
from eagle_jax.cli.trees import choose_tree, default_tree, describe_proposal, grown, parse_tree
from eagle_jax.convert import load_draft
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle.drafting import EagleDraft, with_window
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.medusa import Medusa
from eagle_jax.drafts.protocol import Draft
from eagle_jax.measure.samples import embedded_pair
from eagle_jax.models.params import for_this_machine
from eagle_jax.tree import PUBLISHED_TREES, TreeConfig, TreePolicy


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way of decoding: plain if draft is None, which needs no tree. origin: where the tree comes from, in words."""

    name: str
    draft: Draft | None
    tree: TreePolicy
    origin: str

    @property
    def shape(self) -> str:
        """What it proposes, in words."""
        return describe_proposal(self.draft, self.tree)

    @property
    def words(self) -> str:
        """The same, with where its tree comes from."""
        return f"{self.shape} ({self.origin})" if self.origin else self.shape


@dataclasses.dataclass(frozen=True)
class _Name:
    """weightless: makes the draft; else kind: the class a checkpoint must hold. tree: the default; None: --tree."""

    weightless: Callable[[], Draft] | None = None
    kind: type[Draft] | None = None
    tree: Callable[[Any], TreePolicy] | None = None


NAMES = {
    "plain": _Name(),
    **{name: _Name(weightless=make) for name, make in WEIGHTLESS.items()},
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
    "their kind, or NAME=DIR_OR_ID (an id may end in @REVISION); eagle1 is the static tree and eagle2 the "
    "dynamic one of the same head"
)


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
    models: Models, specs: dict[str, str | None], args: argparse.Namespace, embedded: bool = False
) -> list[Candidate]:
    """The drafts that the specs name, made for the target.

    Args:
      args: --tree, --stop-below and --score-temperature, for dynamic trees; --draft-tree, for one draft by name;
        --draft-window, for EAGLE heads that are loaded here; --batch, to choose among tuned trees.
      embedded: whether the target is the embedded pair's, which has heads of its own for some names.
    Raises:
      ValueError: for a draft with weights whose folder is not named. CheckpointError, ConfigError: as `load_draft`.
    """
    loaded: dict[str, Draft] = {}
    given = dict(getattr(args, "draft_tree", ()))

    def weights(name: str, kind: type[Draft]) -> Draft:
        source = specs.get(name) or specs.get(SAME_WEIGHTS.get(name, ""))
        if source is None and isinstance(models.draft, kind):
            return models.draft
        if source is None and embedded and name in EMBEDDED:
            source = str(embedded_pair() / EMBEDDED[name])
        if source is None:
            raise ValueError(f"{name} needs weights that this model has not; name them: {name}=DIR_OR_ID")
        if source not in loaded:
            path, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
            draft = for_this_machine(load_draft(path, models.target, revision=revision or None))
            window = args.draft_window if isinstance(draft, EagleDraft) else None
            loaded[source] = draft if window is None else with_window(draft, *window)
        if not isinstance(loaded[source], kind):
            raise ValueError(f"{name}={source}: holds a {type(loaded[source]).__name__}, not a {kind.__name__}")
        return loaded[source]

    def tree_of(name: str, draft: Draft) -> tuple[TreePolicy, str]:
        own = NAMES[name].tree
        if name in given:
            return given[name], "from --draft-tree"
        if own is not None:
            return own(draft), "the default"
        if draft is models.draft:
            choice = choose_tree(draft, args, getattr(args, "batch", 1))
            return choice.tree, choice.origin
        return grown(args.tree or TreeConfig(), args), "the default" if args.tree is None else "from --tree"

    found = []
    for name in specs:
        known = NAMES[name]
        if known.kind is None:
            found.append(Candidate(name, known.weightless() if known.weightless else None, TreeConfig(), ""))
        else:
            draft = weights(name, known.kind)
            found.append(Candidate(name, draft, *tree_of(name, draft)))
    return found
