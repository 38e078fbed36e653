"""Flattens a head's config.json: its fields may be in nested objects, and spelled in several ways.

official, SpecForge   fields at the top level
NVIDIA, SGLang        some of them in `eagle_config`
speculators           those of the decoder layer in `transformer_layer_config`
vLLM's EAGLE-1        all of them in `model`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eagle_jax.models.fields import (
    NEUTRAL_VALUES,
    ConfigError,
    joined,
    layer_indices,
    refuse_unknown_mathematics,
    require_equal,
    says_something,
)

NVIDIA = "eagle_config"
LAYER = "transformer_layer_config"
VLLM = "model"
PLACES = (NVIDIA, LAYER, "text_config", VLLM)  # objects that may hold fields of the head, and may be nested

TAPS = "eagle_aux_hidden_state_layer_ids"
# Other spellings of a field.
SPELLINGS = {
    "fusion_bias": "bias",
    "eagle_fc_bias": "bias",
    "target_layer_ids": TAPS,
    "rope_base": "rope_theta",
    "rotary_base": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "use_aux_norm": "fc_norm",
    "return_hidden_post_norm": "norm_output",
    "use_qk_norm": "qk_norm",
    "qk_layernorm": "qk_norm",
}
# The same for one kind: an EAGLE-3 head has these norms whether its config.json states them or not.
SPELLINGS_OF_KIND: dict[str, dict[str, str]] = {
    "eagle3": {},
    "peagle": {"pard_token": "mask_token_id", "ptd_token_id": "mask_token_id"},
    "eagle1": {
        "use_mtp_layernorm": "input_norms",
        "use_input_norm": "input_norms",
        "use_input_layernorm_in_first_layer": "attention_norm",
        "use_attn_norm": "attention_norm",
        "use_last_layernorm": "norm_output",
    },
}
# Norms of EAGLE-1 heads, in all spellings.
EAGLE1_NORMS = ("input_norms", "attention_norm", "norm_output", *SPELLINGS_OF_KIND["eagle1"])

# Fields of EAGLE-3 heads alone, in all spellings: norms and windows.
EAGLE3_ONLY = (
    "fc_norm",
    "use_aux_norm",
    "norm_before_fc",
    "norm_output",
    "return_hidden_post_norm",
    "qk_norm",
    "use_qk_norm",
    "qk_layernorm",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "max_window_layers",
)
# Fields of P-EAGLE heads alone, in all spellings: the rows of the one pass.
PEAGLE_ONLY = ("parallel_drafting", "mask_token_id", "pard_token", "ptd_token_id", "num_depths")
# The fields that DraftConfig.from_hf and PEagleConfig.from_hf read.
READ = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "draft_vocab_size",
    "truncated_vocab_size",
    "target_hidden_size",
    TAPS,
    "num_aux_hidden_states",
    "norm_before_residual",
    "bias",
    "qkv_bias",
    "next_layer_regular",
    "input_norms",
    "attention_norm",
    *EAGLE3_ONLY,
    *PEAGLE_ONLY,
)
# The layer's config is a copy of the target's, whose tie_word_embeddings does not apply to the head.
FIRST_WINS = ("tie_word_embeddings",)

# Values that do not change a head's forward pass, as in `fields.NEUTRAL_VALUES`; for heads of every kind.
NEUTRAL_HEAD_VALUES: dict[str, tuple[Any, ...]] = {
    "use_mtp_layernorm": (False,),
    "layernorms": (False,),
    "add_para_norm": (False,),
    "use_input_norm": (False,),
    # Another layer, or none.
    "mlp_only": (False,),
    "eh_proj_before_attn": (False,),
    "eh_proj_bias": (False,),
    "use_rope": (True,),
    "eagle_decoder_type": ("llama",),
    # Several tokens in one pass (P-EAGLE, DFlash and its relatives).
    "parallel_drafting": (False,),
    "parallel_draft_step": (0, 1),
    "mask_token_id": (),
    "pard_token": (),
    "ptd_token_id": (),
    "num_depths": (0, 1),
    "block_size": (0, 1),
    "use_swa": (False,),
    "dflash_config": (),
    "dspark_config": (),
    "jetspec_config": (),
    "markov_rank": (0,),
    "selector_rank": (0,),
    "enable_confidence_head": (False,),
    # Tapped layers under names that do not say whether the input or the output of the layer is read.
    "aux_hidden_state_layer_ids": (),
    "aux_layer_indices": (),
    "layers_to_capture": (),
}
# The same for one kind: EAGLE-3 heads always have most of these parts, EAGLE-1 heads never.
NEUTRAL_VALUES_OF_KIND: dict[str, dict[str, tuple[Any, ...]]] = {
    "eagle3": {
        "use_aux_hidden_state": (True,),
        "use_input_layernorm_in_first_layer": (True,),
        "use_last_layernorm": (True,),
        "use_attn_norm": (True,),
        "input_norms": (False,),
        "attention_norm": (False,),
        "skip_prenorm": (False,),
        "skip_output_norm": (False,),
    },
    "eagle1": {
        "use_aux_hidden_state": (False,),
        "skip_prenorm": (True,),
        "skip_output_norm": (True,),
        "norm_before_residual": (False,),
        "fc_norm": (False,),
        "norm_before_fc": (False,),
        "use_aux_norm": (False,),
        "return_hidden_post_norm": (False,),
    },
}

NEUTRAL_VALUES_OF_KIND["peagle"] = NEUTRAL_VALUES_OF_KIND["eagle3"]
READ_BY_KIND = {"eagle3": EAGLE3_ONLY, "eagle1": EAGLE1_NORMS, "peagle": (*EAGLE3_ONLY, *PEAGLE_ONLY)}

MATHEMATICS = joined(
    READ, SPELLINGS, EAGLE1_NORMS, NEUTRAL_VALUES, NEUTRAL_HEAD_VALUES, *NEUTRAL_VALUES_OF_KIND.values()
)
# Further fields of `eagle_config`, which describe the head's training or tell nothing of its mathematics.
HARMLESS = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eagle_freeze_base_model",
    "eagle_hidden_state_distillation",
    "eagle_loss_decay_factor",
    "eagle_offline",
    "eagle_report_acc",
    "eagle_self_logit_distillation",
    "eagle_ttt_steps",
    "eos_token_id",
    "has_lm_head",
    "initializer_range",
    "pad_token_id",
    "parallel_draft_heads_num_layers",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "ttt_length",
    "use_cache",
}

SPECULATORS = "speculators_model_type"  # marks a config of the speculators library
# Fields that speculators configs must have, as readers differ on their defaults.
REQUIRED = {
    "eagle3": ("draft_vocab_size", "norm_before_residual"),
    "eagle": ("bias", "layernorms"),
    "peagle": ("draft_vocab_size", "norm_before_residual"),
}
LAYERS = ("auto", "LlamaDecoderLayer")


def flat_config(hf: Mapping[str, Any], where: str, kind: str) -> dict[str, Any]:
    """Returns the fields of a head's config.json under their canonical names; taps as layers whose input is read.

    Args:
      kind: "eagle3", "eagle1" or "peagle".
    Raises:
      ConfigError: naming the fields, for contradictions, unimplemented mathematics, an unknown field of `eagle_config`,
        or a speculator that is no EAGLE head.
    """
    neutral = NEUTRAL_VALUES | NEUTRAL_HEAD_VALUES | NEUTRAL_VALUES_OF_KIND[kind]
    reads = READ_BY_KIND[kind]
    spellings = SPELLINGS | SPELLINGS_OF_KIND[kind]
    flat: dict[str, Any] = {}
    values_of: dict[str, dict[str, Any]] = {}
    for place, fields in _places(hf, where):
        refuse_unknown_mathematics(fields, neutral, where, place, reads)
        _refuse_unread(fields, where, place)
        for spelling, value in fields.items():
            name = spellings.get(spelling, spelling)
            if name == TAPS and says_something(value):
                value = _inputs(spelling, value, where, place)
            if says_something(value):
                flat.setdefault(name, value)
                if name in READ and name not in FIRST_WINS:
                    values_of.setdefault(name, {})[f"{place}{spelling}"] = value
    for name, values in values_of.items():
        if name == TAPS and len(set(values.values())) > 1:
            raise ConfigError(f"{where}: {' and '.join(values)} name different layers: inputs of {values}; keep one")
        require_equal(values, where)
    _check_speculators(hf, flat, where, kind)
    return flat


def is_vllm_eagle1(hf: Mapping[str, Any]) -> bool:
    """Returns whether a config.json has vLLM's form for EAGLE-1 heads."""
    return hf.get("model_type") == "eagle" and isinstance(hf.get(VLLM), Mapping)


def _places(hf: Mapping[str, Any], where: str, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the config and the objects in it that hold fields of the head: ("", hf), ("eagle_config.", ...), ..."""
    yield place, hf
    for name in PLACES:
        value = hf.get(name)
        if isinstance(value, Mapping):
            yield from _places(value, where, f"{place}{name}.")
        elif value is not None and name != VLLM:
            raise ConfigError(f"{where}: {place}{name} must be an object, got {value!r}; the file is damaged")


def _refuse_unread(fields: Mapping[str, Any], where: str, place: str) -> None:
    """Raises ConfigError for fields that are not read and could change the mathematics."""
    for name, value in fields.items():
        if not says_something(value) or name in PLACES or name in MATHEMATICS:
            continue
        if isinstance(value, Mapping) and MATHEMATICS & value.keys():
            inner = ", ".join(sorted(MATHEMATICS & value.keys()))
            raise ConfigError(
                f"{where}: {place}{name} holds {inner}, which are not read there; move them to the top level"
            )
        if place.endswith(f"{NVIDIA}.") and name not in HARMLESS:
            raise ConfigError(
                f"{where}: {place}{name} = {value!r} is not known, and could change what the head computes; "
                "remove it if it does not"
            )


def _inputs(name: str, value: Any, where: str, place: str) -> tuple[int, ...]:
    """Converts tapped layers to layer *inputs*: the output of layer i is the input of layer i + 1.

    `eagle_config` (SGLang, NVIDIA) and `target_layer_ids` name layers whose output is read. The top-level field of
    speculators names layers whose input is read.
    """
    layers = layer_indices(f"{place}{name}", value, where)
    outputs = name != TAPS or place.endswith(f"{NVIDIA}.")
    return tuple(layer + 1 for layer in layers) if outputs else layers


def _check_speculators(hf: Mapping[str, Any], flat: Mapping[str, Any], where: str, kind: str) -> None:
    """Raises ConfigError for a speculators config of another kind than `kind`, or with a missing field."""
    if SPECULATORS not in hf:
        return
    stated = hf[SPECULATORS]
    if stated not in list(REQUIRED):  # a damaged config may hold an unhashable value
        known = ", ".join(map(repr, REQUIRED))
        raise ConfigError(f"{where}: {SPECULATORS} = {stated!r} is not implemented (accepted: {known})")
    if (stated == "peagle") != (kind == "peagle"):
        raise ConfigError(
            f"{where}: {SPECULATORS} = {stated!r}, but a tensor mask_hidden, which P-EAGLE heads have, is "
            f"{'present' if kind == 'peagle' else 'missing'}; the weights are not its own"
        )
    if not isinstance(hf.get(LAYER), Mapping):
        raise ConfigError(f"{where}: {LAYER} must be an object, got {hf.get(LAYER)!r}; the file is damaged")
    named = hf.get("transformer_layer_architecture", "auto")
    if named not in LAYERS:
        raise ConfigError(
            f"{where}: transformer_layer_architecture = {named!r} is not implemented (accepted: {LAYERS})"
        )
    for name in REQUIRED[stated]:
        if name not in flat:
            theirs = "fusion_bias" if name == "bias" else name
            raise ConfigError(f"{where}: {theirs} is missing; take it from the configuration of the head's training")
