"""The frameworks that write EAGLE heads, one entry each: data only. A new framework adds an entry.

docs/export.md says which sources were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.convert.heads.rules import Rules


@dataclasses.dataclass(frozen=True)
class HeadDialect:
    """Describes how a framework writes a head. A checkpoint has the first dialect that it shows; see `dialect_of`.

    title: for messages.
    architectures, marks, tensors: what shows the dialect: `architectures` of its config.json, fields that only it
    writes (at any place), and a pattern of tensor names that only it has.
    read: rules from its names to official ones; `layers.0` may stand for `midlayer`, and `model.` before any name, in
    every dialect. written: rules from official names to its own; several: those of heads of several layers, if others;
    eagle1: those of EAGLE-1 heads, if others.
    split: {its tensor's name without prefix and suffix: the parts that it holds, one after the other}.
    joined: {official name: (its tensors, axis) that are concatenated along that axis}.
    fields: {its spelling: the field that is read}.
    harmless: fields that do not change what a head computes.
    taps: what its ids of tapped layers name, "inputs" or "outputs" of layers; None if that cannot be known.
    norm_output: whether `norm_output` has one meaning, that of EAGLE-3.1.
    required: fields that must be stated, because readers differ on their defaults.
    norms: those that its EAGLE-1 heads may have, fields of a DraftConfig; the tensors tell where config.json does not.
    layer: {model_type: what such a layer has beyond a Llama layer}. "*": any other, which is the target's.
    of_target: {field that is the target's and not applied: the value without effect}.
    layers_of_target: whether num_hidden_layers may be the target's, of a head of one layer.
    """

    title: str
    architectures: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    tensors: str | None = None
    read: Rules = ()
    written: Rules = ()
    several: Rules = ()
    eagle1: Rules | None = None
    split: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    joined: Mapping[str, tuple[tuple[str, ...], int]] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    taps: str | None = None
    norm_output: bool = False
    required: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    of_target: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers_of_target: bool = False


QWEN3 = {"qwen3": {"qk_norm": True}}
# The first layer's name where it is numbered like the others.
NUMBERED: Rules = (("midlayer.*", "layers.0.*"),)
# Later layers have one norm before attention. Some frameworks name it after the first layer's norm of the hidden state.
LATER_NORM: Rules = (("layers.{i}.input_layernorm.weight", "layers.{i}.hidden_norm.weight"),)
# Several layers in a list named midlayer.
MIDLAYERS: Rules = (
    ("midlayer.*", "midlayer.0.*"),
    ("layers.{i}.input_layernorm.weight", "midlayer.{i}.hidden_norm.weight"),
    ("layers.{i}.*", "midlayer.{i}.*"),
)
# One norm for each tap, under the names of older SGLang heads.
AUX_NORMS: Rules = tuple(
    (f"fc_norm.{i}.weight", f"aux_norm_{where}.weight") for i, where in enumerate(("low", "mid", "high"))
)
# Norms of an EAGLE-1 head's embedding and hidden state before fc.
INPUT_NORMS: Rules = (("enorm.weight", "input_norm1.weight"), ("hnorm.weight", "input_norm2.weight"))

DIALECTS: dict[str, HeadDialect] = {
    "speculators": HeadDialect(
        title="speculators",
        marks=("speculators_model_type",),
        written=NUMBERED,
        harmless=(
            "embed_requires_grad",
            "speculators_config",
            "speculators_model_type",
            "speculators_version",
            "transformer_layer_architecture",
        ),
        layer=QWEN3,
        taps="inputs",
        norm_output=True,
        required=("norm_before_residual",),
    ),
    "deepspec": HeadDialect(
        title="DeepSpec",
        architectures=("Qwen3Eagle3Model", "Gemma4Eagle3Model"),
        written=NUMBERED,
        harmless=("draft_num_hidden_layers", "num_target_layers", "step_loss_decay", "target_model_name_or_path"),
        layer=QWEN3,
        taps="outputs",
    ),
    "nemo": HeadDialect(
        title="NeMo Automodel",
        architectures=("LlamaEagle3DraftModel", "LlamaEagleDraftModel"),
        written=(
            ("lm_head.*", "lm_head.*"),
            ("d2t", "d2t"),
            ("t2d", "t2d"),
            ("mask_hidden", "mask_hidden"),
            ("midlayer.*", "model.layers.0.*"),
            ("*", "model.*"),
        ),
        eagle1=(),
        harmless=("down_sample_ratio", "down_sample_ratio_min", "draft_num_hidden_layers"),
        layer={"*": {}},
        of_target={"sliding_window": 0, "use_sliding_window": False, "layer_types": []},
        norm_output=True,
        norms=("attention_norm", "norm_output"),
        layers_of_target=True,
    ),
    "trtllm": HeadDialect(
        title="TensorRT-LLM",
        architectures=("EAGLE3LlamaForCausalLM", "Eagle3DeepSeekV3ForCausalLM", "MistralLarge3EagleForCausalLM"),
        read=(*MIDLAYERS, *LATER_NORM),
        several=MIDLAYERS,
        norm_output=True,
    ),
    "angelslim": HeadDialect(
        title="AngelSlim",
        architectures=("Eagle3LlamaForCausalLM",),
        harmless=("target_model_type",),
    ),
    "mlc": HeadDialect(
        title="MLC-LLM",
        tensors=r".*\.(qkv_proj|gate_up_proj)\..*",
        split={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
        harmless=(
            *("context_window_size", "max_batch_size", "prefill_chunk_size"),
            *("tensor_parallel_shards", "pipeline_parallel_stages", "disaggregation"),
        ),
    ),
    "cpmcu": HeadDialect(
        title="CPM.cu",
        marks=("eagle_num_layers",),
        tensors=r"fc[12]\.(weight|bias)|token_id_remap|input_norm[12]\.weight",
        read=INPUT_NORMS,
        written=INPUT_NORMS,
        joined={"fc.weight": (("fc1.weight", "fc2.weight"), 1), "fc.bias": (("fc1.bias",), 0)},
        fields={"eagle_num_layers": "num_hidden_layers"},
        norms=("input_norms", "attention_norm"),
    ),
    "modelopt": HeadDialect(
        title="Model-Optimizer",
        architectures=("LlamaForCausalLMEagle3Deep",),
        marks=("next_layer_regular", "parallel_draft_heads_num_layers", "use_last_layernorm", "use_mtp_layernorm"),
        tensors=r"midlayer\.\d+\..*|[eh]norm\.weight",
        read=(*MIDLAYERS, *LATER_NORM),
        written=NUMBERED,
        norms=("input_norms", "attention_norm", "norm_output"),
    ),
    "sglang": HeadDialect(
        title="SpecForge or SGLang",
        architectures=("LlamaForCausalLMEagle3", "LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle", "PEagleDraftModel"),
        read=(*AUX_NORMS, *LATER_NORM),
    ),
    "vllm": HeadDialect(
        title="vLLM",
        architectures=("EagleLlamaForCausalLM", "EAGLEModel"),
        written=NUMBERED,
    ),
    # NxD Inference reads the same files, with its own name for the bias of fc.
    "official": HeadDialect(title="the official EAGLE code", fields={"fc_bias": "bias"}, layers_of_target=True),
}

# Tensors of networks that are not implemented, by pattern: what they are.
REFUSED: dict[str, str] = {
    r"(.*\.)?eh_proj\..*": "a projection before the layer (eh_proj_before_attn, MTP)",
    r".*\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\..*": "multi-head latent attention (MLA)",
    r"parallel_draft_heads\..*": "Medusa heads beside an EAGLE head (parallel_draft_step)",
    r"(markov_head|confidence_head|candidate_selector|prefix_gru|embed_proj)\..*": "a head that drafts blocks",
    r".*\.(qweight|qzeros|scales|g_idx|weight_scale|input_scale|q_weight|q_scale)": "quantized weights",
    r"(.*\.)?(lora_[AB])\..*": "a LoRA adapter",
}

# Fields that describe training, generation or a file, and no computation. Names with a leading underscore, too.
HARMLESS = frozenset(
    [
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "base_model_name_or_path",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "generation_config",
        "has_no_defaults_at_init",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "max_window_layers",
        "min_length",
        "mlp_dropout",
        "model_name",
        "modelopt_version",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "producer",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "ttt_length",
        "typical_p",
        "unk_token_id",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
