"""Describes how other engines read an EAGLE head: names, config fields, and heads that they cannot run. Data only.

docs/export.md says which sources were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.convert import names
from eagle_jax.drafts.eagle.flat_config import TAPS
from eagle_jax.drafts.registry import CLASSES
from eagle_jax.models.fields import ConfigError

# Official names of the kinds of EAGLE head; None: the kind is not exported, or in its own format alone.
EXPORTED: dict[str, dict[str, str] | None] = {
    "eagle3": names.EAGLE3,
    "eagle1": names.EAGLE1,
    "dflash": None,
    "dspark": None,
    "peagle": names.PEAGLE,
    "medusa": None,
    "llama": None,
}
# A P-EAGLE head is an EAGLE-3 head with more: what is said of "eagle3" holds for it in every engine that reads it.
FAMILY = {"eagle3": "eagle3", "peagle": "eagle3", "eagle1": "eagle1"}
TITLES = {"eagle3": "an EAGLE-3", "peagle": "a P-EAGLE", "eagle1": "an EAGLE-1"}
KINDS: dict[type, str] = {CLASSES[kind]: kind for kind, table in EXPORTED.items() if table is not None}
EAGLE3, EAGLE1, BOTH = ("eagle3",), ("eagle1",), ("eagle3", "eagle1")
NESTED_TAPS = f"eagle_config.{TAPS}"

# Kinds of RoPE that an engine computes as we do, unless its entry says otherwise.
ROPES = ("default", "linear", "llama3")
YARN = (*ROPES, "yarn")
EVERY_ROPE = (*YARN, "longrope")

# Parts of a head that some engines lack: fields of a DraftConfig, false unless a head has the part, and what lacks it.
PARTS: dict[str, str] = {
    "attention_bias": "its layer has no such bias",
    "mlp_bias": "its layer has no such bias",
    "fc_norm": "it has no norm of each tap",
    "norm_before_fc": "it has no norm before fc",
    "norm_output": "its next step reads the hidden state before the final norm, if there is one",
    "input_norms": "it has no norms before fc",
    "attention_norm": "its layer has no norm before attention",
    "windows": "its layers attend to all positions",
    "qk_norm": "its layer has no such norms",
    "qkv_bias": "its layer has no such bias",
    "norm_before_residual": "its layer has no such residual",
}


@dataclasses.dataclass(frozen=True)
class Engine:
    """Describes one engine's loader. Fields that list kinds ("eagle3", "eagle1") say which kinds a feature is for.

    title: for messages. file: the weights. architectures: of each kind that it reads.
    dialect: a key of `heads.dialects.DIALECTS`, whose names it reads.
    holds: {field of a DraftConfig in PARTS: kinds that may have the part}. several_layers: whether its heads may have
    more than one. always: {kind: parts in PARTS that its heads always have}.
    norm_fields: {norm of an EAGLE-1 head: its config field}, for those that the engine does not find by the tensors.
    taps: the config field that names tapped layers, "" for none. lowest_tap: the first layer whose input it can read.
    num_taps: how many it reads, None for any number. fc_by_width: features as wide as the head itself skip fc.
    taps_option: the engine's own option, which names the outputs of layers in place of the config.
    target_embedding: kinds whose embedding it replaces by the target's; wide_embedding: those that keep their own
    where the target has another width. wide: whether the target may be wider than the head.
    needs: {kind: weights of the target that its files must hold}: "embed", "lm_head", or "copy", an unused lm_head.
    null_vocabulary: whether draft_vocab_size is null of an EAGLE-3 head without an lm_head.
    tables: whether it wants the tables of a head with the target's vocabulary. t2d: whether it knows that table.
    remap: whether an EAGLE-1 head may draft frequent tokens only, which `token_id_remap` lists.
    fc_bias: "any", "always" or "never", of an EAGLE-1 head; fc_bias_field: the config field for it, "" for none.
    wide_fc_bias: whether an EAGLE-3 head's fc may have a bias.
    any_head_dim: whether head_dim may differ from D / heads. ropes: kinds of RoPE; free_theta: those with a base of
    their own. target_rope: whether it uses the target's RoPE. rope_key: the name of the kind in rope_scaling.
    yarn_settings: whether it reads yarn's `truncate` and `attention_factor`.
    nested: fields of a DraftConfig that stand in eagle_config, with their names there. fields: further ones, by kind.
    speculators: whether the layer's fields stand in transformer_layer_config.
    mask_fields: the fields that name the mask token of a P-EAGLE head.
    note: a sentence for the user.
    """

    title: str
    architectures: Mapping[str, str]
    dialect: str
    file: str = "model.safetensors"
    holds: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    several_layers: bool = False
    taps: str = ""
    lowest_tap: int = 0
    num_taps: int | None = 3
    taps_option: str = ""
    fc_by_width: bool = False
    target_embedding: tuple[str, ...] = ()
    wide_embedding: tuple[str, ...] = ()
    wide: bool = True
    needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    null_vocabulary: bool = False
    tables: bool = True
    t2d: bool = True
    remap: bool = False
    fc_bias: str = "any"
    fc_bias_field: str = "bias"
    wide_fc_bias: bool = False
    any_head_dim: bool = True
    ropes: tuple[str, ...] = ROPES
    free_theta: tuple[str, ...] = EVERY_ROPE
    yarn_settings: bool = False
    target_rope: bool = False
    rope_key: str = "rope_type"
    nested: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    speculators: bool = False
    mask_fields: tuple[str, ...] = ()
    always: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    norm_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""


ENGINES: dict[str, Engine] = {
    "official": Engine(
        title="the official EAGLE code",
        file="pytorch_model.bin",
        architectures={"eagle3": "LlamaForCausalLM", "eagle1": "LlamaForCausalLM"},
        dialect="official",
        holds={"qkv_bias": EAGLE1},
        fc_by_width=True,
        needs={"eagle3": ("lm_head",)},
        any_head_dim=False,
        ropes=("default", "linear", "dynamic"),
        free_theta=("default",),
        rope_key="type",
    ),
    "sglang": Engine(
        title="SGLang",
        architectures={"eagle3": "LlamaForCausalLMEagle3", "eagle1": "LlamaForCausalLMEagle"},
        dialect="sglang",
        holds={"attention_bias": EAGLE1, "fc_norm": EAGLE3, "norm_output": EAGLE3},
        taps=NESTED_TAPS,
        lowest_tap=1,
        num_taps=None,
        fc_by_width=True,
        target_embedding=BOTH,
        wide_embedding=EAGLE3,
        null_vocabulary=True,
        ropes=YARN,
        fc_bias="always",
        fc_bias_field="",  # it reads `bias` as the bias of attention
    ),
    "vllm": Engine(
        title="vLLM",
        architectures={
            "eagle3": "LlamaForCausalLMEagle3",
            "peagle": "LlamaForCausalLMEagle3",
            "eagle1": "EagleLlamaForCausalLM",
        },
        dialect="vllm",
        holds={
            "attention_bias": BOTH,
            "mlp_bias": BOTH,
            "fc_norm": EAGLE3,
            "norm_before_fc": EAGLE3,
            "norm_output": EAGLE3,
            "qkv_bias": EAGLE1,
            "norm_before_residual": EAGLE3,
        },
        several_layers=True,
        taps=TAPS,
        ropes=YARN,
        target_embedding=EAGLE1,
        fc_bias="never",
        nested={"norm_before_fc": "norm_before_fc"},
        mask_fields=("pard_token",),
        fields={"peagle": {"parallel_drafting": True}},
    ),
    "speculators": Engine(
        title="speculators",
        architectures={"eagle3": "Eagle3Speculator", "peagle": "PEagleSpeculator"},
        dialect="speculators",
        holds={
            "attention_bias": EAGLE3,
            "mlp_bias": EAGLE3,
            "fc_norm": EAGLE3,
            "norm_before_fc": EAGLE3,
            "norm_output": EAGLE3,
            "windows": EAGLE3,
            "qk_norm": EAGLE3,
            "norm_before_residual": EAGLE3,
        },
        several_layers=True,
        taps=TAPS,
        num_taps=None,
        wide=False,
        ropes=EVERY_ROPE,
        yarn_settings=True,
        needs={"eagle3": ("embed", "lm_head")},
        tables=False,
        speculators=True,
        mask_fields=("mask_token_id",),
        note="speculators_config.verifier names no target: fill it in to train on, or to serve by this folder alone",
    ),
    "specforge": Engine(
        title="SpecForge",
        architectures={"eagle3": "LlamaForCausalLMEagle3"},
        dialect="sglang",
        holds={"fc_norm": EAGLE3},
        taps=NESTED_TAPS,
        lowest_tap=1,
        needs={"eagle3": ("embed", "lm_head")},
    ),
    "modelopt": Engine(
        title="Model-Optimizer",
        architectures={"eagle3": "LlamaForCausalLMEagle3", "eagle1": "LlamaForCausalLMEagle"},
        dialect="modelopt",
        holds={
            "attention_bias": EAGLE3,
            "mlp_bias": EAGLE3,
            "input_norms": EAGLE1,
            "attention_norm": EAGLE1,
            "norm_output": EAGLE1,
        },
        norm_fields={
            "input_norms": "eagle_config.use_mtp_layernorm",
            "attention_norm": "eagle_config.use_input_layernorm_in_first_layer",
            "norm_output": "eagle_config.use_last_layernorm",
        },
        several_layers=True,
        taps=NESTED_TAPS,
        lowest_tap=1,
        num_taps=None,
        target_embedding=BOTH,
        needs={"eagle3": ("lm_head",), "eagle1": ("copy",)},
        tables=False,
        t2d=False,
        fc_bias="never",
        fields={
            "eagle3": {
                "eagle_config": {
                    "use_aux_hidden_state": True,
                    "use_input_layernorm_in_first_layer": True,
                    "use_last_layernorm": True,
                    "use_mtp_layernorm": False,
                    "next_layer_regular": True,
                }
            }
        },
    ),
    "nemo": Engine(
        title="NeMo Automodel",
        architectures={
            "eagle3": "LlamaEagle3DraftModel",
            "peagle": "LlamaEagle3DraftModel",
            "eagle1": "LlamaEagleDraftModel",
        },
        dialect="nemo",
        holds={
            "attention_bias": BOTH,
            "mlp_bias": BOTH,
            "fc_norm": EAGLE3,
            "norm_output": BOTH,
            "attention_norm": EAGLE1,
        },
        always={"eagle1": ("attention_norm", "norm_output")},
        needs={"eagle3": ("embed", "lm_head"), "eagle1": ("embed",)},
        fc_bias="never",
        ropes=("default", "llama3"),
        mask_fields=("mask_token_id",),
        fields={
            "eagle3": {"num_aux_hidden_states": 3},
            "peagle": {"num_aux_hidden_states": 3, "parallel_drafting": True},
            "eagle1": {"draft_num_hidden_layers": 1},
        },
    ),
    "angelslim": Engine(
        title="AngelSlim",
        architectures={"eagle3": "Eagle3LlamaForCausalLM"},
        dialect="angelslim",
        needs={"eagle3": ("lm_head",)},
        ropes=("default", "linear", "dynamic"),
        free_theta=("default",),
        rope_key="type",
    ),
    "trtllm": Engine(
        title="TensorRT-LLM",
        architectures={"eagle3": "EAGLE3LlamaForCausalLM"},
        dialect="trtllm",
        holds={
            "attention_bias": EAGLE3,
            "mlp_bias": EAGLE3,
            "fc_norm": EAGLE3,
            "norm_before_fc": EAGLE3,
            "norm_output": EAGLE3,
        },
        several_layers=True,
        taps=NESTED_TAPS,
        lowest_tap=1,
        num_taps=None,
        taps_option="eagle3_layers_to_capture",
        fc_by_width=True,
        target_embedding=EAGLE3,
        wide_embedding=EAGLE3,
        tables=False,
        wide_fc_bias=True,
        nested={"norm_before_fc": "norm_before_fc", "norm_output": "return_hidden_post_norm"},
    ),
    "cpmcu": Engine(
        title="CPM.cu",
        architectures={"eagle3": "LlamaForCausalLM", "eagle1": "LlamaForCausalLM"},
        dialect="cpmcu",
        holds={"input_norms": EAGLE1, "attention_norm": EAGLE1},
        norm_fields={"input_norms": "use_input_norm", "attention_norm": "use_attn_norm"},
        target_embedding=BOTH,
        wide=False,
        needs={"eagle3": ("lm_head",)},
        t2d=False,
        remap=True,
        fc_bias="always",
        target_rope=True,
        fields={"eagle3": {"eagle_num_layers": 1}, "eagle1": {"eagle_num_layers": 1}},
    ),
    "nxd": Engine(
        title="NxD Inference",
        architectures={"eagle3": "LlamaForCausalLM", "eagle1": "LlamaForCausalLM"},
        dialect="official",
        wide=False,
        needs={"eagle3": ("embed", "lm_head"), "eagle1": ("embed", "copy")},
        fc_bias_field="fc_bias",
        ropes=("default", "llama3"),
    ),
}


def named(format: str) -> Engine:
    """Returns the engine of a format for EAGLE heads; raises ConfigError for an unknown one."""
    if format not in ENGINES:
        raise ConfigError(f"unknown format {format!r}; known: {', '.join(ENGINES)}")
    return ENGINES[format]
