"""The kinds of draft by name, as commands know them: data only. Add a line for a new kind.

For drafts with weights, convert, train and cli have further tables, keyed by `Kind.weights`. Drafts without weights
need none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.drafts.dflash import DFlash, DFlashConfig
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.dspark import DSpark, DSparkConfig
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.p_eagle import PEagle, PEagleConfig
from eagle_jax.drafts.lookahead import Lookahead
from eagle_jax.drafts.lookup_first import without_lookup
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.drafts.prompt_lookup import PromptLookup
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models.config import LlamaConfig
from eagle_jax.tree import PUBLISHED_TREES, BestPrefixes, StaticTree, TreeConfig, TreePolicy


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of draft.

    description: for help texts.
    weights: the name in manifests, training settings and tables; None for drafts without weights.
    config: the class of its `config`; None without weights.
    tree: the default; None for a draft with a fixed tree.
    deepest: the field of `config` that bounds a tree's depth, if any.
    settings: arguments of the class, for drafts without weights.
    """

    draft: type[Draft]
    description: str
    weights: str | None = None
    config: type | None = None
    tree: TreePolicy | None = None
    deepest: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


BLOCK_TREE = BestPrefixes(depth=15, num_nodes=64)
SHORT_TREE = BestPrefixes(depth=7, num_nodes=32)  # every node has its own logits, so that fewer nodes are cheaper
MEDUSA_TREE = PUBLISHED_TREES["medusa-mc-sim-7b-63"]

# Where names share a class, a draft loaded without a name gets the last one's tree.
KINDS: dict[str, Kind] = {
    "lookahead": Kind(Lookahead, "n-grams that the target made in passing"),
    "prompt-lookup": Kind(PromptLookup, "a copy of the text so far"),
    "prompt-lookup-tree": Kind(PromptLookup, "four such copies", settings={"branches": 4}),
    "model": Kind(DraftModel, "a smaller model", "llama", LlamaConfig, StaticTree.chain(5)),
    "medusa": Kind(Medusa, "Medusa heads", "medusa", MedusaConfig, MEDUSA_TREE, deepest="num_heads"),
    "dflash": Kind(DFlash, "a DFlash head, a block in one pass", "dflash", DFlashConfig, BLOCK_TREE, deepest="deepest"),
    "dspark": Kind(
        DSpark, "a DSpark head, its block corrected along paths", "dspark", DSparkConfig, SHORT_TREE, deepest="deepest"
    ),
    "eagle1": Kind(Eagle1Draft, "an EAGLE-1 head, static tree", "eagle1", DraftConfig, PUBLISHED_TREES["eagle"]),
    "eagle2": Kind(Eagle1Draft, "the same head, dynamic tree", "eagle1", DraftConfig, TreeConfig()),
    "eagle3": Kind(Eagle3Draft, "an EAGLE-3 head, dynamic tree", "eagle3", DraftConfig, TreeConfig()),
    "peagle": Kind(
        PEagle, "a P-EAGLE head, all depths in one pass", "peagle", PEagleConfig, BLOCK_TREE, deepest="num_depths"
    ),
}
# Drafts without weights, by command name; the classes of the others, by `weights`.
WEIGHTLESS = {name: kind for name, kind in KINDS.items() if kind.weights is None}
CLASSES = {kind.weights: kind.draft for kind in KINDS.values() if kind.weights is not None}


def kind_of(draft: Draft | None) -> Kind | None:
    """Returns the kind of a draft, of `LookupFirst` its draft's; None for plain decoding and for a user's draft."""
    draft = without_lookup(draft)
    return next((kind for kind in reversed(KINDS.values()) if isinstance(draft, kind.draft)), None)
