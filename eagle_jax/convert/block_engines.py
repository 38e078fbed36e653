"""Describes how engines and trainers read a head that drafts blocks (DFlash, DSpark). Data only.

docs/export.md says which sources were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from eagle_jax.drafts.dflash import DFlashConfig
from eagle_jax.drafts.dspark import DSparkConfig


def _has_heads(config: DFlashConfig) -> bool:
    return isinstance(config, DSparkConfig) and bool(config.markov_rank or config.confidence)


# Parts of a head that some engines lack: whether a config has the part, and what a message says of it.
FEATURES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "some tokens": (
        lambda config: config.draft_vocab_size > 0,
        "it drafts some of the tokens (draft_vocab_size), its files have no table of them",
    ),
    "from root": (
        lambda config: config.from_root,
        "its output at the root predicts a token (sample_from_anchor), those of the format's heads do not",
    ),
    "after root": (
        lambda config: not config.from_root,
        "its output at the root predicts no token (sample_from_anchor is false), those of the format's heads do",
    ),
    "causal": (lambda config: config.causal, "its block is causal, the format's heads see the whole block"),
    "windows": (lambda config: any(config.windows), "it has windows, which the format does not state"),
    "windows one way": (
        lambda config: any(config.windows) and config.causal_windows and not config.causal,
        "its layers with a window are causal in the block, those of the format's heads are not",
    ),
    "windows both ways": (
        lambda config: any(config.windows) and not config.causal_windows and not config.causal,
        "its layers with a window see the whole block, those of the format's heads are causal",
    ),
    "the embedding's output": (
        lambda config: 0 in config.taps,
        "it taps the input of layer 0, the format names outputs of layers",
    ),
    "no Markov head": (
        lambda config: isinstance(config, DSparkConfig) and not config.markov_rank,
        "it has no Markov head (markov_rank is 0), the format's heads have one",
    ),
    "no heads": (
        lambda config: isinstance(config, DSparkConfig) and not _has_heads(config),
        "it has neither a Markov head nor a confidence head, so that it reads back as a DFlash head",
    ),
    "plain confidence": (
        lambda config: isinstance(config, DSparkConfig) and config.confidence and not config.confidence_with_markov,
        "its confidence head reads no Markov embedding (confidence_head_with_markov is false)",
    ),
}
OUTPUTS = ("the embedding's output", "no heads")  # what no format lacks that names outputs: see FEATURES


@dataclasses.dataclass(frozen=True)
class BlockEngine:
    """Describes one reader of such heads.

    title: for messages. dialect: a key of `heads.blocks.BLOCKS`, which its files show. architecture: of config.json.
    needs: weights of the target that its files must hold, "embed" or "lm_head"; they hold none otherwise.
    lacks: keys of FEATURES.
    fields, nested: further fields of config.json, and of its `dflash_config`.
    own_form: whether its config.json is the one of `to_hf`.
    """

    title: str
    dialect: str
    architecture: str = "DFlashDraftModel"
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nested: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own_form: bool = False
    note: str = ""


BOTH = ("embed", "lm_head")
OF_DFLASH = ("some tokens", "from root", *OUTPUTS)
OF_DSPARK = ("some tokens", "after root", *OUTPUTS)
DEEPSPEC = BlockEngine(
    title="DeepSpec",
    dialect="block deepspec",
    architecture="Qwen3DSparkModel",
    needs=BOTH,
    lacks=(*OF_DSPARK, "causal", "windows"),
    fields={"num_anchors": 512},
)
DEEPSPEC_DFLASH = dataclasses.replace(
    DEEPSPEC, fields={**DEEPSPEC.fields, "markov_rank": 0, "enable_confidence_head": False}
)
SPECULATORS = BlockEngine(
    title="speculators",
    dialect="block speculators",
    architecture="DFlashSpeculator",
    needs=BOTH,
    lacks=("causal", "no heads"),
    note="speculators_config.verifier names no target: fill it in to train on, or to serve by this folder alone",
)
# By format and kind of head.
BLOCK_ENGINES: dict[str, dict[str, BlockEngine]] = {
    "official": {
        "dflash": BlockEngine("DFlash's authors' code", "block", lacks=OF_DFLASH, own_form=True),
        "dspark": dataclasses.replace(DEEPSPEC, title="DSpark's authors' code"),
    },
    "deepspec": {"dflash": DEEPSPEC_DFLASH, "dspark": DEEPSPEC},
    "speculators": {"dflash": SPECULATORS, "dspark": dataclasses.replace(SPECULATORS, architecture="DSparkSpeculator")},
    "specforge": {
        "dflash": BlockEngine(
            title="SpecForge",
            dialect="block",
            lacks=(*OF_DFLASH, "causal", "windows both ways"),
            fields={"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}},
        ),
        "dspark": BlockEngine(
            title="SpecForge",
            dialect="block specforge",
            architecture="DSparkDraftModel",
            lacks=(*OF_DSPARK, "causal", "windows both ways"),
            fields={"auto_map": {"AutoModel": "dspark.DSparkDraftModel"}},
            nested={"projector_type": "dspark"},
        ),
    },
    "nemo": {
        "dflash": BlockEngine(
            title="NeMo Automodel",
            dialect="block nemo",
            architecture="Qwen3DFlashDraftModel",
            lacks=(*OF_DFLASH, "windows one way"),
            fields={"is_causal": False},
        ),
        "dspark": dataclasses.replace(DEEPSPEC, title="NeMo Automodel"),
    },
    "modelopt": {
        "dflash": BlockEngine("Model-Optimizer", "block", lacks=(*OF_DFLASH, "causal", "windows")),
        "dspark": BlockEngine(
            title="Model-Optimizer",
            dialect="block modelopt",
            lacks=(*OF_DSPARK, "causal", "windows", "no Markov head", "plain confidence"),
            nested={"projector_type": "dspark"},
        ),
    },
}
