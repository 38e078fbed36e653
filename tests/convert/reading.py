"""Reads heads that no file holds, and changes their names as a dialect writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert import HeadChoices
from eagle_jax.convert.match import Match, match_draft
from eagle_jax.convert.read import Checkpoint, Tensor
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.models import params
from tests.convert.folders import CONFIG, HEAD_CONFIG, Arrays

TAPS = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURE = "architectures"
EAGLE1_CONFIG = CONFIG | {"num_hidden_layers": 1}
# Beside the sizes, as speculators writes it.
SPECULATORS = {
    "speculators_model_type": "eagle3",
    "norm_before_residual": False,
    "transformer_layer_config": HEAD_CONFIG,
}
OUTPUTS = {"eagle_config": {TAPS: [1, 4, 6]}}
MAY_BE_EITHER = {"eagle_config": {TAPS: [2, 4, 6]}}
Change = Callable[[Arrays], Arrays]


def in_memory(config: dict[str, Any], arrays: Arrays) -> Checkpoint:
    """A checkpoint that no file holds: what a reader sees of a folder."""
    tensors = {
        name: Tensor(name, Path("head/model.safetensors"), a.shape, a.dtype.name, lambda a=a: a)
        for name, a in arrays.items()
    }
    return Checkpoint("head", Path("head"), config, tensors, (Path("head/model.safetensors"),))


def read(config: dict[str, Any], arrays: Arrays, choices: HeadChoices | None = None, layers: int = 8) -> Match:
    return match_draft(in_memory(config, arrays), np.dtype(np.float32), choices, layers)


def parameters(match: Match) -> Arrays:
    return {path: match.read(path) for path in params.flatten(match.model)}


def taps(match: Match, layers: int = 8) -> tuple[int, ...]:
    return tap_layers(match.model.config, layers)


def renamed(*pairs: tuple[str, str]) -> Change:
    """Replaces beginnings of names."""

    def change(arrays: Arrays) -> Arrays:
        out = {}
        for name, array in arrays.items():
            old, new = next(((old, new) for old, new in pairs if name.startswith(old)), ("", ""))
            out[new + name.removeprefix(old)] = array
        return out

    return change


def fused(arrays: Arrays) -> Arrays:
    out = dict(arrays)
    for whole, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
        room = whole.partition(".")[0]
        names = [f"layers.0.{room}.{part}_proj.weight" for part in parts]
        out[f"layers.0.{whole}_proj.weight"] = np.concatenate([out.pop(name) for name in names])
    return out
