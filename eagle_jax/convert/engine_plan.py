"""Plans the export of a head: what an engine's files hold, and why an engine cannot run a head.

Letters: D head width, V vocabulary, Vd draft vocabulary, n target layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.block_engines import BLOCK_ENGINES
from eagle_jax.convert.block_plan import check_block, needed_by_block, plan_block
from eagle_jax.convert.engines import ENGINES, EXPORTED, FAMILY, KINDS, PARTS, TITLES, Engine, named
from eagle_jax.convert.heads.dialects import DIALECTS
from eagle_jax.convert.heads.rules import theirs_of
from eagle_jax.convert.heads.taps import OUR_NORM_OUTPUT, OUR_TAPS
from eagle_jax.convert.match import output_path
from eagle_jax.convert.official import to_official
from eagle_jax.convert.plans import Plan, is_targets, speculators_config, target_rows
from eagle_jax.drafts.dflash import DFlash
from eagle_jax.drafts.eagle.config import DraftConfig, tap_layers
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.flat_config import TAPS
from eagle_jax.drafts.eagle.p_eagle import PEagleConfig
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models.config import ConfigError
from eagle_jax.models.llama import Llama
from eagle_jax.models.rope import RopeConfig
from eagle_jax.models.target import logit_softcap

COPY = "copy"  # of the target's lm_head, which an EAGLE-1 head does not use
NORMS = ("fc_norm", "norm_before_fc", "norm_output")


def plan(draft: Draft, target: Llama, format: str) -> Plan:
    """Plans the export of a head in a format.

    Args:
      draft: an Eagle3Draft, Eagle1Draft, DFlash or DSpark. For the last two, "official" is the format of their authors.
      target: its target. Of its arrays only `embed` is read, where an engine replaces the head's embedding or needs
        one, and `lm_head`, where the head has none and the engine needs one.
    Raises:
      ConfigError: a draft without a format, or one that the engine would run differently; the message names the
        fields and the formats that can hold it. Or an abstract target, of which an array is needed.
    """
    if isinstance(draft, DFlash):
        return plan_block(draft, target, format)
    check_engine(draft, target, format)
    engine = named(format)
    assert isinstance(draft, Eagle3Draft | Eagle1Draft)
    kind = KINDS[type(draft)]
    config = draft.config
    layers = target.config.num_layers
    taps = None if kind == "eagle1" else tap_layers(config, layers)
    stated = None if taps == tap_layers(None, layers) else taps
    notes = [engine.note] if engine.note else []
    if config.window is not None:
        notes.append("the draft window is not part of a checkpoint: set one in the engine, if it has one")
    if stated is not None and engine.taps_option:
        notes.append(
            f"pass {engine.taps_option}={_outputs(stated)} to {engine.title}, which does not read the config's"
        )

    added: dict[str, np.ndarray] = {}
    if kind == "eagle1" and engine.fc_bias == "always" and not config.fc_bias:
        added["fc_bias"] = np.zeros((config.hidden_size,), draft.dtype)
        notes.append(f"fc.bias was added, all zero: {engine.title} always has one")
    needs = needed(draft, format)
    if "embed" in needs:
        added["embed"] = target_rows(target, "embed")
        notes.append(f"embed_tokens.weight was added, the target's: {engine.title} takes none from the target")
    if "lm_head" in needs:
        added["lm_head"] = target_rows(target, output_path(target))
        notes.append(f"lm_head.weight was added, the target's: {engine.title} takes none from the target")
    if kind == "eagle1" and draft.target_ids is not None:
        notes.append(
            f"pass frspec_vocab_size={config.draft_vocab_size} to {engine.title}'s LLM_with_eagle, and one of "
            f"use_rope, use_input_norm, use_attn_norm: else it makes no room for {names.REMAP}"
        )
    expected = _expected(config, kind, stated, added, draft.target_ids is not None)
    tensors = _tensors(draft, kind, engine, added)
    if COPY in needs:
        tensors[names.LLAMA["lm_head"]] = target_rows(target, output_path(target))
    return Plan(kind, engine.file, tensors, _config_json(expected, kind, engine, target), expected, added, tuple(notes))


def needed(draft: Draft, format: str) -> tuple[str, ...]:
    """Returns what an export takes of the target's weights: "embed", "lm_head" or COPY."""
    if isinstance(draft, DFlash):
        return needed_by_block(draft, format)
    if not isinstance(draft, Eagle3Draft | Eagle1Draft):
        return ()
    missing = {"embed": not draft.config.own_embedding, "lm_head": not draft.config.own_lm_head, COPY: True}
    return tuple(what for what in named(format).needs.get(FAMILY[KINDS[type(draft)]], ()) if missing[what])


def check_engine(draft: Draft, target: Llama, format: str) -> None:
    """Raises the ConfigError of `plan`. Both models may be abstract."""
    if isinstance(draft, DFlash):
        check_block(draft, target, format)
        return
    if not isinstance(draft, Eagle3Draft | Eagle1Draft):
        raise ConfigError(
            f"a {type(draft).__name__} cannot be exported: the formats are for EAGLE heads (Eagle3Draft, PEagle, "
            "Eagle1Draft) and heads that draft blocks (DFlash, DSpark)"
        )
    if format in BLOCK_ENGINES and format not in ENGINES:
        raise ConfigError(
            f"format {format} is for heads that draft blocks, not for {TITLES[KINDS[type(draft)]]} head; choose one of "
            f"{', '.join(ENGINES)}"
        )
    engine = named(format)
    draft.check_fits(target)
    reasons = refusals(draft, target, format)
    if reasons:
        others = [name for name in ENGINES if not refusals(draft, target, name)]
        fix = f"formats that can hold it: {', '.join(others)}" if others else "no other format can hold it either"
        raise ConfigError(f"{engine.title} cannot run this head: {'; '.join(reasons)} ({fix})")


def refusals(draft: Eagle3Draft | Eagle1Draft, target: Llama, format: str) -> list[str]:
    """Returns the reasons why an engine would not run this EAGLE head as it was trained; empty if it would."""
    engine, kind = named(format), KINDS[type(draft)]
    config = draft.config
    if kind not in engine.architectures:
        return [f"it is {TITLES[kind]} head, which the engine does not read"]
    several, kind = engine.several_layers or kind == "peagle", FAMILY[kind]
    found = []
    if not engine.any_head_dim and config.head_dim * config.num_heads != config.hidden_size:
        found.append(f"head_dim is {config.head_dim}, it takes hidden_size / heads only")
    if not engine.wide and config.target_hidden_size != config.hidden_size:
        found.append(f"target_hidden_size is {config.target_hidden_size}, it takes features of the head's own width")
    if logit_softcap(target) is not None and {"lm_head", COPY} & set(needed(draft, format)):
        found.append("the target caps its logits, the file's copy of its lm_head has no cap")
    found += _rope_refusals(config.rope, target.config.rope, engine)
    if config.own_embedding and kind in engine.target_embedding:
        wide = kind in engine.wide_embedding and config.target_hidden_size != config.hidden_size
        if not wide and not is_targets(draft, "embed", target, "embed"):
            found.append("embed_tokens is its own, the engine drafts with the target's embedding")
    for part, lacks in PARTS.items():
        stated = getattr(config, part)
        if part == "qkv_bias" and config.attention_bias:
            continue  # attention_bias says it
        if stated and kind not in engine.holds.get(part, ()):
            found.append(f"{part} is {'true' if stated is True else stated}, {lacks}")
        if not stated and part in engine.always.get(kind, ()):
            found.append(f"{part} is false, its heads always have it")
    if len(set(config.windows) - {None}) > 1:
        found.append(f"windows is {config.windows}, a config.json states one size")
    if kind == "eagle1":
        if draft.target_ids is not None and not engine.remap:
            found.append(f"it drafts {config.draft_vocab_size} of {config.vocab_size} tokens, its files have no table")
        if config.fc_bias and engine.fc_bias == "never":
            found.append("fc.bias (bias is true) is not read")
        return found
    if config.fc_bias and not engine.wide_fc_bias:
        found.append("fc.bias of an EAGLE-3 head is not read")
    if config.num_layers > 1 and not several:
        found.append(f"it has {config.num_layers} layers, the engine's heads have one")
    return found + _tap_refusals(config, target.config.num_layers, engine)


def _rope_refusals(rope: RopeConfig, target_rope: RopeConfig, engine: Engine) -> list[str]:
    if rope.kind not in engine.ropes:
        return [f"rope type {rope.kind!r} is not read, or computed in another way"]
    if rope.kind not in engine.free_theta and rope.theta != 10000:
        return [f"rope_theta is {rope.theta:g}, it takes 10000 for rope type {rope.kind!r}"]
    if rope.kind == "yarn" and not engine.yarn_settings and _plain_yarn(rope) != rope:
        return [
            f"its yarn has attention_factor {rope.attention_factor:g} and truncate {str(rope.truncate).lower()}, "
            "the engine takes neither from a config.json"
        ]
    if engine.target_rope and rope != target_rope:
        return ["its RoPE is not the target's, which the engine uses for both"]
    return []


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


def _outputs(taps: tuple[int, ...]) -> list[int]:
    """Returns the layers whose output is the input of these: the output of i is the input of i + 1."""
    return [tap - 1 for tap in taps]


def _tensors(draft: Any, kind: str, engine: Engine, added: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a head's arrays by the engine's names."""
    table = EXPORTED[kind]
    assert table is not None  # `check_engine` has refused the others
    tensors = to_official(draft) | {table[path]: array for path, array in added.items()}
    if kind != "eagle1" and not engine.tables and draft.target_ids is None:
        del tensors[names.DRAFT_TO_TARGET], tensors[names.TARGET_TO_DRAFT]
    if not engine.t2d:
        tensors.pop(names.TARGET_TO_DRAFT, None)
    if kind == "eagle1" and draft.target_ids is not None:
        del tensors[names.DRAFT_TO_TARGET]
        tensors[names.REMAP] = np.asarray(draft.target_ids[...])
    dialect = DIALECTS[engine.dialect]
    rules = dialect.several if draft.config.num_layers > 1 and dialect.several else dialect.written
    rules = dialect.eagle1 if kind == "eagle1" and dialect.eagle1 is not None else rules
    return {theirs_of(name, rules): array for name, array in tensors.items()}


def _expected(
    config: DraftConfig, kind: str, taps: tuple[int, ...] | None, added: Mapping[str, np.ndarray], table: bool
) -> DraftConfig:
    """Returns the config that reading the export gives."""
    eagle3 = kind != "eagle1"
    return dataclasses.replace(
        config,
        tie_word_embeddings=False,
        taps=taps,
        draft_vocab_size=config.draft_vocab_size if eagle3 or table else config.vocab_size,
        target_hidden_size=config.target_hidden_size if eagle3 else config.hidden_size,
        qkv_bias=config.qkv_bias and not config.attention_bias,  # which says it
        norm_before_residual=config.norm_before_residual and eagle3,
        fc_bias=config.fc_bias or "fc_bias" in added,
        window=None,
        own_embedding=config.own_embedding or "embed" in added,
        own_lm_head=config.own_lm_head or "lm_head" in added,
    )


def _config_json(config: DraftConfig, kind: str, engine: Engine, target: Llama) -> dict[str, Any]:
    """Returns the config.json of a head whose config already has the form that reading back gives."""
    head = {"architectures": [engine.architectures[kind]]}
    layer = _layer_fields(config, engine)
    fixed = engine.fields.get(kind, {})
    more: dict[str, Any] = {name: value for name, value in fixed.items() if name != "eagle_config"}
    if "target_model_type" in DIALECTS[engine.dialect].harmless:
        more["target_model_type"] = target.config.model_type
    if kind == "eagle1":
        # SGLang reads `bias` as the bias of attention.
        bias = {engine.fc_bias_field: config.fc_bias} if engine.fc_bias_field else {}
        if config.draft_vocab_size != config.vocab_size:
            more["draft_vocab_size"] = config.draft_vocab_size
        return (
            head | layer | bias | ({"qkv_bias": True} if config.qkv_bias else {}) | more | _eagle1_norms(config, engine)
        )
    more |= _eagle3_fields(config, engine) | _peagle_fields(config, engine)
    if not engine.speculators:
        return head | layer | more
    tokens = config.num_depths if isinstance(config, PEagleConfig) else 3
    return (
        head
        | speculators_config(kind, tokens)
        | {
            "transformer_layer_config": layer,
            "tie_word_embeddings": False,
            **{"norm_before_residual": False, **more},
        }
    )


def _layer_fields(config: DraftConfig, engine: Engine) -> dict[str, Any]:
    """Returns the fields of a Llama layer, or of a Qwen3 layer where q and k have norms."""
    fields: dict[str, Any] = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope, engine.rope_key),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": False,
    }
    if config.windows:
        fields["use_sliding_window"] = True
        fields["sliding_window"] = max(window for window in config.windows if window is not None)
        kinds = ("full_attention" if window is None else "sliding_attention" for window in config.windows)
        fields["layer_types"] = list(kinds)
    return fields


def _rope_scaling(rope: RopeConfig, key: str) -> dict[str, Any] | None:
    """Returns the scaling of a RoPE, with the name of its kind under `key`; None without one."""
    if rope.kind == "default":
        return None
    length = {"original_max_position_embeddings": rope.original_length}
    if rope.kind == "longrope":
        factors = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        return {key: rope.kind, **factors, "attention_factor": rope.attention_factor, **length}
    scaling: dict[str, Any] = {key: rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        bounds = {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        return scaling | bounds | length
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, **length}
        if _plain_yarn(rope) != rope:
            scaling |= {"truncate": rope.truncate, "attention_factor": rope.attention_factor}
    return scaling


def _plain_yarn(rope: RopeConfig) -> RopeConfig:
    """Returns a yarn with the defaults of `truncate` and `attention_factor`, as a config.json without them is read."""
    settings = {"rope_type": "yarn", "factor": rope.factor, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    settings["original_max_position_embeddings"] = rope.original_length
    return RopeConfig.from_hf({"rope_theta": rope.theta, "rope_scaling": settings}, rope.original_length, "")


def _eagle1_norms(config: DraftConfig, engine: Engine) -> dict[str, Any]:
    """Returns the fields of an EAGLE-1 head's norms, for an engine whose configs state them."""
    top: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for norm, field in engine.norm_fields.items():
        (nested if field.startswith("eagle_config.") else top)[field.removeprefix("eagle_config.")] = getattr(
            config, norm
        )
    return top | ({"eagle_config": nested} if nested else {})


def _eagle3_fields(config: DraftConfig, engine: Engine) -> dict[str, Any]:
    """Returns the fields of an EAGLE-3 head beside those of its layers."""
    null = engine.null_vocabulary and not config.own_lm_head
    fields: dict[str, Any] = {"draft_vocab_size": None if null else config.draft_vocab_size}
    nested = dict(engine.fields.get("eagle3", {}).get("eagle_config", {}))
    if config.target_hidden_size != config.hidden_size:
        fields["target_hidden_size"] = config.target_hidden_size
    if config.norm_before_residual:
        fields["norm_before_residual"] = True
    if config.fc_bias:
        fields["bias"] = True
    for norm in NORMS:
        if getattr(config, norm) and norm in engine.nested:
            nested |= {"use_aux_hidden_state": True, engine.nested[norm]: True}
        elif getattr(config, norm):
            fields[norm] = True
    if config.norm_output and "norm_output" not in engine.nested and not DIALECTS[engine.dialect].norm_output:
        fields[OUR_NORM_OUTPUT] = True
    if config.taps is not None and engine.taps == TAPS:
        fields[TAPS] = list(config.taps)
    elif config.taps is not None:
        outputs = _outputs(config.taps)
        nested |= {"use_aux_hidden_state": True, TAPS: outputs}
        if outputs[0] > 1:  # else a reader knows that they are outputs
            fields[OUR_TAPS] = list(config.taps)
    return fields | ({"eagle_config": nested} if nested else {})


def _peagle_fields(config: DraftConfig, engine: Engine) -> dict[str, Any]:
    """Returns the fields that only a P-EAGLE head has; none of another head."""
    if not isinstance(config, PEagleConfig):
        return {}
    depths = {} if engine.speculators else {"num_depths": config.num_depths}
    return dict.fromkeys(engine.mask_fields, config.mask_token_id) | depths
