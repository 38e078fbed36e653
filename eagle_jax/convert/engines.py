"""Describes how other engines read an EAGLE head: names, config fields, and heads that they cannot run.

Letters: D head width, V vocabulary, Vd draft vocabulary, n target layers. docs/export.md says which sources were read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.official import to_official
from eagle_jax.drafts.eagle.config import DraftConfig, tap_layers
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.flat_config import TAPS
from eagle_jax.drafts.protocol import Draft
from eagle_jax.drafts.registry import CLASSES
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from eagle_jax.models.llama import Llama

# Official names of the exportable kinds; None: no engine here reads the kind.
EXPORTED: dict[str, dict[str, str] | None] = {
    "eagle3": names.EAGLE3,
    "eagle1": names.EAGLE1,
    "medusa": None,
    "llama": None,
}
KINDS: dict[type, str] = {CLASSES[kind]: kind for kind, table in EXPORTED.items() if table is not None}
BOTH = ("eagle3", "eagle1")
# Parts of EAGLE-3 heads that the official head lacks: fields of a DraftConfig, false unless a head has the part.
PARTS = ("fc_norm", "norm_before_fc", "norm_output", "windows", "qk_norm", "qkv_bias", "fc_bias")


@dataclasses.dataclass(frozen=True)
class Engine:
    """Describes one engine's loader. Fields that list kinds ("eagle3", "eagle1") say which kinds a feature is for.

    title: for messages. file: the weights. architectures: of each kind. midlayer: the layer of an EAGLE-3 head is
    called midlayer, else layers.0.
    taps: the config field that names tapped layers, "" for none. lowest_tap: the first layer whose input it can read.
    num_taps: how many it reads, None for any number. fc_by_width: features as wide as the head itself skip fc.
    target_embedding: kinds whose embedding it replaces by the target's; wide_embedding: those that keep their own
    where the target has another width. target_lm_head: whether an EAGLE-3 head without an lm_head drafts with the
    target's; null_vocabulary: if its draft_vocab_size is null. fc_bias: "any", "always" or "never", of an EAGLE-1 head.
    any_head_dim: whether head_dim may differ from D / heads. ropes: kinds of RoPE; free_theta: those with a base of
    their own.
    """

    title: str
    file: str
    architectures: Mapping[str, str]
    midlayer: bool
    taps: str
    lowest_tap: int
    num_taps: int | None
    fc_by_width: bool
    target_embedding: tuple[str, ...]
    wide_embedding: tuple[str, ...]
    target_lm_head: bool
    null_vocabulary: bool
    fc_bias: str
    norm_before_residual: bool
    attention_bias: tuple[str, ...]
    mlp_bias: tuple[str, ...]
    qkv_bias: bool
    any_head_dim: bool
    ropes: tuple[str, ...]
    free_theta: tuple[str, ...]


ENGINES: dict[str, Engine] = {
    "official": Engine(
        title="the official EAGLE code",
        file="pytorch_model.bin",
        architectures={"eagle3": "LlamaForCausalLM", "eagle1": "LlamaForCausalLM"},
        midlayer=True,
        taps="",
        lowest_tap=0,
        num_taps=3,
        fc_by_width=True,
        target_embedding=(),
        wide_embedding=(),
        target_lm_head=False,
        null_vocabulary=False,
        fc_bias="any",
        norm_before_residual=False,
        attention_bias=(),
        mlp_bias=(),
        qkv_bias=True,
        any_head_dim=False,
        ropes=("default", "linear", "dynamic"),
        free_theta=("default",),
    ),
    "sglang": Engine(
        title="SGLang",
        file="model.safetensors",
        architectures={"eagle3": "LlamaForCausalLMEagle3", "eagle1": "LlamaForCausalLMEagle"},
        midlayer=True,
        taps=f"eagle_config.{TAPS}",
        lowest_tap=1,
        num_taps=None,
        fc_by_width=True,
        target_embedding=BOTH,
        wide_embedding=("eagle3",),
        target_lm_head=True,
        null_vocabulary=True,
        fc_bias="always",
        norm_before_residual=False,
        attention_bias=("eagle1",),
        mlp_bias=(),
        qkv_bias=False,
        any_head_dim=True,
        ropes=("default", "linear", "llama3"),
        free_theta=("default", "linear", "llama3"),
    ),
    "vllm": Engine(
        title="vLLM",
        file="model.safetensors",
        architectures={"eagle3": "LlamaForCausalLMEagle3", "eagle1": "EagleLlamaForCausalLM"},
        midlayer=False,
        taps=TAPS,
        lowest_tap=0,
        num_taps=3,
        fc_by_width=False,
        target_embedding=("eagle1",),
        wide_embedding=(),
        target_lm_head=True,
        null_vocabulary=False,
        fc_bias="never",
        norm_before_residual=True,
        attention_bias=BOTH,
        mlp_bias=BOTH,
        qkv_bias=True,
        any_head_dim=True,
        ropes=("default", "linear", "llama3"),
        free_theta=("default", "linear", "llama3"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the contents of an export.

    kind: of the head. file: of the weights; tensors: by the engine's names; config: config.json but for the dtype.
    expected: the config after reading back; added: {path: parameter} missing from the head itself.
    notes: sentences for the user.
    """

    kind: str
    file: str
    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    expected: DraftConfig
    added: dict[str, np.ndarray]
    notes: tuple[str, ...]


def plan(draft: Draft, target: Llama, format: str) -> Plan:
    """Plans the export of a head in a format.

    Args:
      draft: an Eagle3Draft or Eagle1Draft.
      target: its target. Of its arrays only `embed` is read, where an engine replaces the head's embedding, and
        `lm_head`, where the head has none and the engine needs one.
    Raises:
      ConfigError: a draft that is no EAGLE head, or one that the engine would run differently; the message names the
        fields and the formats that can hold it. Or an abstract target, of which the lm_head is needed.
    """
    check_engine(draft, target, format)
    assert isinstance(draft, Eagle3Draft | Eagle1Draft)
    engine, kind = _engine(format), KINDS[type(draft)]
    config = draft.config
    layers = target.config.num_layers
    taps = tap_layers(config, layers) if kind == "eagle3" else ()
    named = taps if taps != tap_layers(None, layers) else None
    notes, added = [], {}
    if config.window is not None:
        notes.append("the draft window is not part of a checkpoint: set one in the engine, if it has one")
    if kind == "eagle1" and engine.fc_bias == "always" and not config.fc_bias:
        added["fc_bias"] = np.zeros((config.hidden_size,), draft.dtype)
        notes.append(f"fc.bias was added, all zero: {engine.title} always has one")

    borrowed = kind == "eagle3" and not config.own_lm_head
    if borrowed and not engine.target_lm_head:
        added["lm_head"] = _output_rows(target)
        notes.append(f"lm_head.weight was added, the target's: {engine.title} takes none from the target")

    tensors = to_official(draft)
    table = EXPORTED[kind]
    assert table is not None  # `check_engine` has refused the others
    tensors |= {table[path]: array for path, array in added.items()}
    if kind == "eagle3" and not engine.midlayer:
        tensors = {name.replace("midlayer.", "layers.0."): array for name, array in tensors.items()}
    expected = dataclasses.replace(
        config,
        tie_word_embeddings=False,
        taps=named if kind == "eagle3" else None,
        draft_vocab_size=config.draft_vocab_size if kind == "eagle3" else config.vocab_size,
        target_hidden_size=config.target_hidden_size if kind == "eagle3" else config.hidden_size,
        norm_before_residual=config.norm_before_residual and kind == "eagle3",
        fc_bias=config.fc_bias or "fc_bias" in added,
        qkv_bias=config.qkv_bias and kind == "eagle1",
        window=None,
        own_lm_head=not borrowed or "lm_head" in added,
    )
    return Plan(kind, engine.file, tensors, _config_json(expected, kind, engine), expected, added, tuple(notes))


def check_engine(draft: Draft, target: Llama, format: str) -> None:
    """Raises the ConfigError of `plan`. Both models may be abstract."""
    engine = _engine(format)
    if not isinstance(draft, Eagle3Draft | Eagle1Draft):
        raise ConfigError(
            f"a {type(draft).__name__} cannot be exported: the formats are for EAGLE heads (Eagle3Draft, Eagle1Draft)"
        )
    draft.check_fits(target)
    reasons = refusals(draft, target, format)
    if reasons:
        others = [name for name in ENGINES if not refusals(draft, target, name)]
        fix = f"formats that can hold it: {', '.join(others)}" if others else "no other format can hold it either"
        raise ConfigError(f"{engine.title} cannot run this head: {'; '.join(reasons)} ({fix})")


def refusals(draft: Eagle3Draft | Eagle1Draft, target: Llama, format: str) -> list[str]:
    """Returns the reasons why an engine would not run this EAGLE head as it was trained; empty if it would."""
    engine, kind = _engine(format), KINDS[type(draft)]
    config = draft.config
    found = []
    for name, kinds in (("attention_bias", engine.attention_bias), ("mlp_bias", engine.mlp_bias)):
        if getattr(config, name) and kind not in kinds:
            found.append(f"{name} is true, its layer has no such bias")
    if not engine.any_head_dim and config.head_dim * config.num_heads != config.hidden_size:
        found.append(f"head_dim is {config.head_dim}, it takes hidden_size / heads only")
    rope = config.rope
    if rope.kind not in engine.ropes:
        found.append(f"rope type {rope.kind!r} is not read, or computed in another way")
    elif rope.kind not in engine.free_theta and rope.theta != 10000:
        found.append(f"rope_theta is {rope.theta:g}, it takes 10000 for rope type {rope.kind!r}")
    if config.own_embedding and kind in engine.target_embedding:
        wide = kind in engine.wide_embedding and config.target_hidden_size != config.hidden_size
        if not wide and not _same_embedding(draft, target):
            found.append("embed_tokens is its own, the engine drafts with the target's embedding")
    if kind == "eagle1":
        if config.qkv_bias and not config.attention_bias and not engine.qkv_bias:
            found.append("qkv_bias is true, its layer has no such bias")
        if config.fc_bias and engine.fc_bias == "never":
            found.append("fc.bias (bias is true) is not read")
        return found
    found += [
        f"{part} is {getattr(config, part)}, the format has no such part" for part in PARTS if getattr(config, part)
    ]
    if config.num_layers > 1:
        found.append(f"it has {config.num_layers} layers, the format's head has one")
    if config.norm_before_residual and not engine.norm_before_residual:
        found.append("norm_before_residual is true, its layer has no such residual")
    return found + _tap_refusals(config, target.config.num_layers, engine)


def _tap_refusals(config: DraftConfig, layers: int, engine: Engine) -> list[str]:
    """Refuses taps that are not ascending, repeated, or after the last layer: engines read them while layers run."""
    taps = tap_layers(config, layers)
    found = []
    if taps != tap_layers(None, layers) and not engine.taps:
        found.append(f"it taps layers {list(taps)}, the engine always reads {list(tap_layers(None, layers))}")
    elif any(a >= b for a, b in itertools.pairwise(taps)):
        found.append(f"it taps layers {list(taps)}, the engine reads each layer once and in order")
    elif taps[0] < engine.lowest_tap or taps[-1] >= layers:
        found.append(f"it taps layers {list(taps)}, the engine reads the inputs of {engine.lowest_tap} to {layers - 1}")
    if engine.num_taps not in (None, len(taps)):
        found.append(f"it taps {len(taps)} layers, the engine reads {engine.num_taps}")
    if engine.fc_by_width and len(taps) * config.target_hidden_size == config.hidden_size:
        found.append(f"its features are as wide as the head ({config.hidden_size}), the engine skips fc then")
    return found


def _same_embedding(draft: Any, target: Llama) -> bool:
    """Returns whether the head's embedding, cast to the target's dtype, equals the target's. Unknown counts as no."""
    ours, theirs = params.flatten(draft)["embed"], params.flatten(target)["embed"]
    if isinstance(theirs, jax.ShapeDtypeStruct):
        return False
    return np.array_equal(np.asarray(ours).astype(theirs.dtype), np.asarray(theirs))


def _output_rows(target: Llama) -> np.ndarray:
    """Returns the target's output matrix [V, D]."""
    leaf = params.flatten(target)["embed" if target.lm_head is None else "lm_head"]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ConfigError("this head has no lm_head, and the target is abstract: load the target with its weights")
    return np.asarray(leaf)


def _config_json(config: DraftConfig, kind: str, engine: Engine) -> dict[str, Any]:
    """Returns the config.json of a head whose config already has the form that reading back gives."""
    rope, type_name = config.rope, "rope_type" if engine.any_head_dim else "type"
    scaling: dict[str, Any] | None = None
    if rope.kind != "default":
        scaling = {type_name: rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling = {
            **(scaling or {}),
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    fields: dict[str, Any] = {
        "architectures": [engine.architectures[kind]],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": False,
    }
    if kind == "eagle1":
        # SGLang reads `bias` as the bias of attention.
        if engine.fc_bias != "always":
            fields["bias"] = config.fc_bias
        return fields | ({"qkv_bias": True} if config.qkv_bias else {})
    null = engine.null_vocabulary and not config.own_lm_head
    fields["draft_vocab_size"] = None if null else config.draft_vocab_size
    if config.target_hidden_size != config.hidden_size:
        fields["target_hidden_size"] = config.target_hidden_size
    if config.norm_before_residual:
        fields["norm_before_residual"] = True
    if config.taps is not None and engine.taps == TAPS:
        fields[TAPS] = list(config.taps)
    elif config.taps is not None:
        # Layers whose output is read: the output of i is the input of i + 1.
        fields["eagle_config"] = {"use_aux_hidden_state": True, TAPS: [tap - 1 for tap in config.taps]}
    return fields


def _engine(format: str) -> Engine:
    if format not in ENGINES:
        raise ConfigError(f"unknown format {format!r}; known: {', '.join(ENGINES)}")
    return ENGINES[format]
