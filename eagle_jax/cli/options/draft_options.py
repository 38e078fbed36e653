"""Makes drafts from names, for commands that compare or show several: plain, lookahead, medusa=DIR, eagle3, ..."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from eagle_jax.cli import tuned
from eagle_jax.cli.options.model_options import Models, with_head_options
from eagle_jax.cli.options.tree_options import choose_tree, default_tree, describe_proposal, grown, parse_tree
from eagle_jax.convert import load_draft
from eagle_jax.convert.hub import named_revision
from eagle_jax.drafts.lookup_first import LookupFirst
from eagle_jax.drafts.protocol import Draft
from eagle_jax.drafts.registry import KINDS, Kind
from eagle_jax.measure.samples import embedded_pair
from eagle_jax.models.params import for_this_machine
from eagle_jax.tree import StaticTree, TreeConfig, TreePolicy


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A named draft with its tree; plain decoding if the draft is None. origin: where the tree comes from, in words."""

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
        """What it proposes and where its tree comes from, in words."""
        return f"{self.shape} ({self.origin})" if self.origin else self.shape


NAMES: dict[str, Kind | None] = {"plain": None, **KINDS}  # None: no draft
WITH_WEIGHTS = {name: kind for name, kind in KINDS.items() if kind.weights is not None}
# Folders of the embedded pair's heads, by the kind of weights.
EMBEDDED: dict[str, str | None] = {
    "eagle1": "head_eagle1",
    "eagle3": "head",
    "dflash": None,
    "dspark": None,
    "peagle": None,
    "medusa": None,
    "llama": None,
}

SPEC_HELP = (
    "ways to decode, in this order: plain, "
    + ", ".join(f"{name} ({kind.description})" for name, kind in KINDS.items())
    + ". Those with weights take the model's own head if it is of their kind, or NAME=DIR_OR_ID (an id may end in "
    "@REVISION); eagle1 is the static tree and eagle2 the dynamic one of the same head. NAME+lookup copies from "
    "the text where its last two tokens occurred before, and asks the draft elsewhere"
)
LOOKUP = "+lookup"  # ends the name of a draft with weights


def parse_specs(text: str) -> dict[str, str | None]:
    """Parses "plain,medusa=DIR,eagle3" to {name: folder, hub id or None}; the type of an argparse option."""
    specs: dict[str, str | None] = {}
    for spec in text.split(","):
        name, _, source = spec.strip().partition("=")
        draft = name.removesuffix(LOOKUP)
        if draft not in NAMES:
            raise argparse.ArgumentTypeError(f"unknown draft {draft!r}; known: {', '.join(NAMES)}")
        if name != draft and draft not in WITH_WEIGHTS:
            raise argparse.ArgumentTypeError(f"{name}: {LOOKUP} goes with {', '.join(WITH_WEIGHTS)}")
        if name in specs:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
        if source and draft not in WITH_WEIGHTS:
            raise argparse.ArgumentTypeError(f"{name} has no weights, so {name}={source} means nothing")
        specs[name] = source or None
    return specs


def parse_draft_tree(text: str) -> tuple[str, TreePolicy]:
    """Parses "eagle1=TREE" to ("eagle1", tree); the type of an argparse option."""
    name, _, tree = text.partition("=")
    if name.removesuffix(LOOKUP) not in WITH_WEIGHTS:
        known = ", ".join(WITH_WEIGHTS)
        raise argparse.ArgumentTypeError(f"{text!r}: trees are for {known}, such as eagle1=paths.json")
    return name, parse_tree(tree)


def candidates(
    models: Models, specs: dict[str, str | None], args: argparse.Namespace, embedded: bool = False
) -> list[Candidate]:
    """Returns the drafts that the specs name, made or loaded for the target.

    Args:
      args: --tree, --stop-below and --score-temperature, for dynamic trees; --draft-tree, for one draft by name;
        --draft-window and --confidence, for heads that are loaded here; --batch, to choose among tuned trees.
      embedded: whether the target is the embedded pair's, which has heads of its own for some names.
    Raises:
      ValueError: for a draft with weights whose folder is not named. CheckpointError, ConfigError: as `load_draft`.
    """
    loaded: dict[str, Draft] = {}
    given = dict(getattr(args, "draft_tree", ()))

    def weights(name: str, kind: Kind) -> Draft:
        source = specs.get(name) or next(filter(None, map(specs.get, _same_weights(kind))), None)
        if source is None and isinstance(models.draft, kind.draft):
            return models.draft
        own = EMBEDDED[kind.weights] if embedded and kind.weights else None
        if source is None and own is not None:
            source = str(embedded_pair() / own)
        if source is None:
            raise ValueError(f"{name} needs weights that this model has not; name them: {name}=DIR_OR_ID")
        if source not in loaded:
            path, revision = named_revision(source)
            draft = for_this_machine(load_draft(path, models.target, revision=revision))
            loaded[source] = with_head_options(draft, args)
        if not isinstance(loaded[source], kind.draft):
            raise ValueError(f"{name}={source}: holds a {type(loaded[source]).__name__}, not a {kind.draft.__name__}")
        return loaded[source]

    def tree_of(name: str, draft: Draft, kind: Kind) -> tuple[TreePolicy, str]:
        if name in given:
            return given[name], "from --draft-tree"
        if kind.tree is None:
            return TreeConfig(), ""
        if isinstance(kind.tree, StaticTree):  # --tree is for the dynamic ones
            return default_tree(draft, kind), "the default"
        batch = getattr(args, "batch", 1)
        if draft is models.draft:
            choice = choose_tree(draft, args, batch)
            return choice.tree, choice.origin
        if args.tree is not None:
            return grown(args.tree, args), "from --tree"
        folder = next(Path(source) for source, other in loaded.items() if other is draft)
        tree, origin = tuned.find(draft, folder, batch) or (default_tree(draft, kind), "the default")
        return grown(tree, args), origin

    found = []
    for name in specs:
        kind = NAMES[name.removesuffix(LOOKUP)]
        if kind is None:
            found.append(Candidate(name, None, TreeConfig(), ""))
            continue
        draft = kind.draft(**kind.settings) if kind.weights is None else weights(name, kind)
        tree, origin = tree_of(name, draft, kind)
        found.append(Candidate(name, LookupFirst(draft) if name.endswith(LOOKUP) else draft, tree, origin))
    return found


def _same_weights(kind: Kind) -> list[str]:
    """Returns the names of the drafts that are made of the same kind of weights."""
    names = [name for name, known in WITH_WEIGHTS.items() if known.weights == kind.weights]
    return [*names, *(name + LOOKUP for name in names)]
