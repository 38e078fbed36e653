"""The config.json of heads made by speculators, as one flat config: there the decoder layer's is nested in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KIND = "speculators_model_type"  # the field that tells such a config
LAYER = "transformer_layer_config"

# What each kind adds to its layer's config: the name there -> ours.
FIELDS: dict[str, dict[str, str]] = {
    "eagle3": {
        "draft_vocab_size": "draft_vocab_size",
        "target_hidden_size": "target_hidden_size",
        "norm_before_residual": "norm_before_residual",
        "eagle_aux_hidden_state_layer_ids": "eagle_aux_hidden_state_layer_ids",
        "norm_before_fc": "norm_before_fc",
        "fc_norm": "fc_norm",
        "norm_output": "norm_output",
    },
    "eagle": {"fusion_bias": "bias", "layernorms": "layernorms"},
}
# Readers differ on what an absent one means.
REQUIRED = {"eagle3": ("draft_vocab_size", "norm_before_residual"), "eagle": ("fusion_bias", "layernorms")}
LAYERS = ("auto", "LlamaDecoderLayer")


def flat_config(hf: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A speculators config with its layer's fields beside its own; any other config as it is.

    Raises:
      ValueError: a kind of speculator that is no EAGLE head, or a missing field; the message names it.
    """
    if KIND not in hf:
        return hf
    kind, layer = hf[KIND], hf.get(LAYER)
    if kind not in FIELDS:
        raise ValueError(f"{where}: {KIND} = {kind!r} is not implemented (accepted: {', '.join(map(repr, FIELDS))})")
    if not isinstance(layer, Mapping):
        raise ValueError(f"{where}: {LAYER} must be an object, got {layer!r}; the file is damaged")
    if hf.get("transformer_layer_architecture", "auto") not in LAYERS:
        named = hf["transformer_layer_architecture"]
        raise ValueError(f"{where}: transformer_layer_architecture = {named!r} is not implemented (accepted: {LAYERS})")
    for name in REQUIRED[kind]:
        if hf.get(name) is None:
            raise ValueError(f"{where}: {name} is missing; take it from the configuration of the head's training")
    return dict(layer) | {ours: hf[theirs] for theirs, ours in FIELDS[kind].items() if theirs in hf}
