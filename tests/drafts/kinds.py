"""Small drafts of every kind of the registry, with random weights: the one list that tests of properties run over.

A test takes it by `every_kind`. tests/drafts/test_registry.py finds a kind of the registry that is missing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest

from eagle_jax import (
    BestExpansions,
    BestPrefixes,
    DraftConfig,
    DraftModel,
    Eagle1Draft,
    Eagle3Draft,
    Llama,
    LlamaConfig,
    Lookahead,
    LookupFirst,
    Medusa,
    MedusaConfig,
    PromptLookup,
    StaticTree,
    TreeConfig,
    with_window,
)
from eagle_jax.drafts.dflash import DFlash, DFlashConfig
from eagle_jax.drafts.dspark import DSpark, DSparkConfig
from eagle_jax.drafts.eagle.p_eagle import PEagle, PEagleConfig
from tests.drafts.successors import Successors
from tests.toy import scaled

DYNAMIC = TreeConfig(depth=3, top_k=2, num_nodes=6)
STATIC = StaticTree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


@dataclasses.dataclass(frozen=True)
class Kind:
    """build(target's config, seed, scale) -> draft, and the tree it is asked for."""

    build: Callable[[LlamaConfig, int, float], Any]
    tree: Any = DYNAMIC


def head_config(config: LlamaConfig, draft_vocab_size: int) -> DraftConfig:
    own = {"num_layers": 1, "draft_vocab_size": draft_vocab_size, "target_hidden_size": config.hidden_size}
    return DraftConfig(**config.__dict__ | own)


def eagle1(config, seed, scale):
    head = dataclasses.replace(head_config(config, config.vocab_size), fc_bias=True)
    return scaled(Eagle1Draft(head, jax.random.key(seed)), scale)


def eagle1_of_parts(config, seed, scale):
    """Every norm that some frameworks' EAGLE-1 heads have, over frequent tokens only."""
    norms = {"input_norms": True, "attention_norm": True, "norm_output": True}
    head = dataclasses.replace(head_config(config, config.vocab_size * 2 // 3), **norms)
    return scaled(Eagle1Draft(head, jax.random.key(seed)), scale)


def eagle3(config, seed, scale):
    """Over a part of the vocabulary only."""
    return scaled(Eagle3Draft(head_config(config, config.vocab_size * 2 // 3), 3, jax.random.key(seed)), scale)


def eagle3_of_parts(config, seed, scale):
    """Two layers, one with a window shorter than a tree, and every part that the official head lacks."""
    parts = {"num_layers": 2, "windows": (2, None), "qk_norm": True, "qkv_bias": True, "fc_bias": True}
    parts |= {"own_embedding": True, "norm_before_residual": True, "norm_before_fc": True, "taps": (0, 1, 2, 3)}
    parts["max_position_embeddings"] = 4  # limits no text: only the target's does
    head = dataclasses.replace(head_config(config, config.vocab_size), head_dim=12, **parts)
    return scaled(Eagle3Draft(head, 4, jax.random.key(seed)), scale)


def eagle31(config, seed, scale):
    """A norm for each tap, the normalised hidden state fed on, and a window in the one layer."""
    parts = {"fc_norm": True, "norm_output": True, "windows": (3,)}
    head = dataclasses.replace(head_config(config, config.vocab_size * 2 // 3), **parts)
    return scaled(Eagle3Draft(head, 3, jax.random.key(seed)), scale)


def medusa(config, seed, scale):
    sizes = MedusaConfig(config.vocab_size, config.hidden_size, num_heads=3, num_blocks=1)
    return scaled(Medusa(sizes, jax.random.key(seed)), scale)


BLOCK = {"num_layers": 2, "qk_norm": True, "block_size": 5, "mask_token_id": 1, "taps": (0, 2)}


def dflash(config, seed, scale, **more):
    """The first layer has a window shorter than the text."""
    parts = BLOCK | {"windows": (3, None)}
    return scaled(DFlash(DFlashConfig(**config.__dict__ | parts | more), jax.random.key(seed)), scale)


def jetspec(config, seed, scale):
    return dflash(config, seed, scale, causal=True)


def dspark(config, seed, scale, **more):
    """All that a DSpark head may have, over a part of the vocabulary; unconfident nodes have no children."""
    parts = BLOCK | {"own_embedding": True, "own_lm_head": True, "markov_rank": 4, "markov_type": "rnn"}
    parts["draft_vocab_size"] = config.vocab_size * 2 // 3
    parts |= {"confidence": True, "confidence_with_markov": True, "confidence_threshold": 0.3}
    return scaled(DSpark(DSparkConfig(**config.__dict__ | parts | more), jax.random.key(seed)), scale)


def dspark_vanilla(config, seed, scale):
    """The simplest one: the target's embedding and output matrix, and no confidence."""
    less = {"own_embedding": False, "own_lm_head": False, "draft_vocab_size": 0}
    less |= {"confidence": False, "confidence_with_markov": False}
    return dspark(config, seed, scale, markov_type="vanilla", **less)


def dspark_gated(config, seed, scale):
    """Causal, and with a confidence that knows no tokens."""
    return dspark(config, seed, scale, markov_type="gated", causal=True, confidence_with_markov=False)


def p_eagle(config, seed, scale):
    """Over a part of the vocabulary; the first layer has a window shorter than the text."""
    parts = {"num_layers": 2, "windows": (3, None), "qk_norm": True, "own_embedding": True, "taps": (0, 2)}
    head = vars(head_config(config, config.vocab_size * 2 // 3)) | parts
    return scaled(PEagle(PEagleConfig(**head, mask_token_id=1, num_depths=4), 2, jax.random.key(seed)), scale)


def p_eagle_with_window(config, seed, scale):
    return with_window(p_eagle(config, seed, scale), 1, 3)


def model(config, seed, scale):
    return DraftModel(scaled(Llama(dataclasses.replace(config, num_layers=1), jax.random.key(seed)), scale))


KINDS = {
    "eagle1": Kind(eagle1, STATIC),
    "eagle2": Kind(eagle1),
    "eagle1 parts": Kind(eagle1_of_parts),
    "eagle3": Kind(eagle3),
    "eagle3 static": Kind(eagle3, STATIC),
    "eagle3 adaptive": Kind(eagle3, TreeConfig(depth=3, top_k=3, num_nodes=9, stop_below=0.3)),
    "eagle3 parts": Kind(eagle3_of_parts),
    "eagle3.1": Kind(eagle31),
    "medusa": Kind(medusa, STATIC),
    "medusa dynamic": Kind(medusa),
    "medusa best prefixes": Kind(medusa, BestPrefixes(depth=3, num_nodes=8)),
    "dflash": Kind(dflash, BestPrefixes(depth=4, num_nodes=9)),
    "dflash best expansions": Kind(dflash, BestExpansions(depth=4, top_k=2, num_nodes=9)),
    "dflash chain": Kind(dflash, StaticTree.chain(4)),
    "dflash dynamic": Kind(dflash),
    "jetspec": Kind(jetspec, BestExpansions(depth=4, top_k=2, num_nodes=8)),
    "dspark": Kind(dspark, BestPrefixes(depth=4, num_nodes=8)),
    "dspark vanilla": Kind(dspark_vanilla, StaticTree.chain(5)),
    "dspark gated": Kind(dspark_gated, BestExpansions(depth=5, top_k=2, num_nodes=11)),
    "dspark dynamic": Kind(dspark),
    "p-eagle": Kind(p_eagle, BestExpansions(depth=4, top_k=2, num_nodes=10)),
    "p-eagle best prefixes": Kind(p_eagle_with_window, BestPrefixes(depth=4, num_nodes=7)),
    "p-eagle chain": Kind(p_eagle, StaticTree.chain(4)),
    "lookahead": Kind(lambda *_: Lookahead(window=4, ngram=3, guesses=3, remembered=4)),
    "lookahead of bigrams": Kind(lambda *_: Lookahead(window=3, ngram=2, guesses=2, remembered=8)),
    "prompt lookup": Kind(lambda *_: PromptLookup(length=4)),
    "prompt lookup tree": Kind(lambda *_: PromptLookup(length=3, branches=3, ngram=2)),
    "lookup first": Kind(lambda *sizes: LookupFirst(model(*sizes), length=5, ngram=2, least=1), StaticTree.chain(3)),
    "draft model": Kind(model, StaticTree.chain(3)),
    "draft model tree": Kind(model, STATIC),
    "draft model dynamic": Kind(model),
    "toy": Kind(lambda *_: Successors(3)),
}

# They propose as other kinds do, with another tree or other parts of a head.
VARIANTS = {
    *("eagle3 static", "eagle3 parts", "medusa dynamic", "medusa best prefixes"),
    *("dflash best expansions", "dflash chain", "dflash dynamic", "jetspec"),
    *("dspark vanilla", "dspark gated", "dspark dynamic", "p-eagle best prefixes", "p-eagle chain"),
    *("lookahead of bigrams", "draft model dynamic"),
}
OWN_WAYS = [kind for kind in KINDS if kind not in VARIANTS]


def every_kind(*quick: str) -> list[Any]:
    """Returns pytest's parameters for all of KINDS. Those that are not `quick` are run by test-long."""
    assert set(quick) <= set(KINDS)
    return [pytest.param(kind, marks=[] if kind in quick else [pytest.mark.slow]) for kind in KINDS]
