"""The architectures of targets that are read, by `model_type`, in one table.

They share one decoder, `Llama`, whose parts a `LlamaConfig` chooses. An entry reads an architecture's config.json into
such a config, and names the tensors that Llama's layers lack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from eagle_jax.models.config import ExpertsConfig, LlamaConfig, llama_fields
from eagle_jax.models.fields import (
    NEUTRAL_VALUES,
    ConfigError,
    flag,
    layer_indices,
    positive,
    refuse_unknown_mathematics,
    require_equal,
    size,
)
from eagle_jax.models.layers import ACTIVATIONS
from eagle_jax.models.llama import Llama
from eagle_jax.models.rope import RopeConfig

HF = Mapping[str, Any]  # a parsed config.json
EXPERTS = ("num_local_experts", "num_experts")  # two names of one field


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes what an architecture has and Llama has not.

    fields: (config.json, its name in messages) -> the fields of LlamaConfig that `llama_fields` does not read.
    reads: the fields of config.json that `fields` reads. Others of `NEUTRAL_VALUES` must have Llama's values.
    defaults: values of fields that an absent one stands for, where these are not Llama's.
    names: {path in a layer: official tensor name in a layer}, where `names.LAYER` has another or none; those of
      experts say how they are stored, see convert/experts.py.
    model: (config, key, dtype) -> the model: Llama, or a subclass with parts of its own.
    outer_names: {path outside of layers: official tensor name}, of a subclass's own parts.
    """

    fields: Callable[[HF, str], dict[str, Any]] = lambda hf, where: {}
    reads: tuple[str, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    model: Callable[[LlamaConfig, jax.Array, Any], Llama] = Llama
    outer_names: dict[str, str] = dataclasses.field(default_factory=dict)


def config_of(hf: HF, where: str = "config.json") -> LlamaConfig:
    """Reads the config.json of any architecture in ARCHITECTURES.

    Args:
      where: its name, for error messages.
    Raises:
      ConfigError: naming an architecture, a field or a value that is not implemented, or a size that is impossible.
    """
    hf = text_config(hf, where)
    name = hf.get("model_type") or "llama"
    name = "llama" if name in NEUTRAL_VALUES["model_type"] else name
    if name not in list(ARCHITECTURES):  # a damaged config.json may hold an unhashable value
        accepted = ", ".join((*ARCHITECTURES, *MULTIMODAL))
        raise ConfigError(f"{where}: model_type = {name!r} is not implemented (accepted: {accepted})")
    architecture = ARCHITECTURES[name]
    hf = {**_defaults(architecture, hf), **hf}
    refuse_unknown_mathematics(hf, NEUTRAL_VALUES, where, reads=("model_type", *architecture.reads))
    shared = {name: value for name, value in hf.items() if name not in architecture.reads}
    fields = llama_fields(shared, where) | architecture.fields(hf, where)
    return LlamaConfig(**fields, model_type=name)


def text_config(hf: HF, where: str = "config.json") -> HF:
    """Returns the config.json of a multimodal model's text part alone; that of any other model as it is.

    Raises:
      ConfigError: naming a field outside `text_config` that would change the text part, or a text part of another kind.
    """
    if hf.get("model_type") not in list(MULTIMODAL):  # a damaged config.json may hold an unhashable value
        return hf
    kind, defaults = MULTIMODAL[hf["model_type"]]
    refuse_unknown_mathematics(hf, NEUTRAL_VALUES, where, reads=("model_type",))
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"{where}: text_config must be an object, got {text!r}; the file is damaged")
    if text.get("model_type") not in (None, kind):
        raise ConfigError(f"{where}: text_config.model_type = {text['model_type']!r} is not implemented (only {kind})")
    whole = {name: hf[name] for name in OF_THE_WHOLE if hf.get(name) is not None}
    return {**defaults, **text, **whole, "model_type": kind}


def _defaults(architecture: Architecture, hf: HF) -> dict[str, Any]:
    """Returns the defaults of an architecture; those of RoPE only if `rope_parameters` or `rope_scaling` has none."""
    stated = [hf[name] for name in ("rope_parameters", "rope_scaling") if isinstance(hf.get(name), Mapping)]
    unused = {"rope_scaling"} if hf.get("rope_parameters") else set()
    unused |= {"rope_theta"} if any("rope_theta" in settings for settings in stated) else set()
    return {name: value for name, value in architecture.defaults.items() if name not in unused}


def layer_windows(hf: HF, where: str, is_windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Reads the window of each layer: `sliding_window`, in the layers that `layer_types` names.

    Args:
      is_windowed: says it of a layer's index where the config has no `layer_types`.
    Returns:
      None for full attention; () if no layer has a window.
    """
    layers = size("num_hidden_layers", hf.get("num_hidden_layers"), where)
    kinds = hf.get("layer_types")
    if not kinds:
        kinds = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(layers)]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types must list a kind for each of {layers} layers, got {kinds!r}")
    other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if other:
        raise ConfigError(f"{where}: layer_types {other[0]!r} is not implemented (only full and sliding attention)")
    if "sliding_attention" not in kinds:
        return ()
    window = size("sliding_window", hf.get("sliding_window"), where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _mistral(hf: HF, where: str) -> dict[str, Any]:
    """Reads one window for all layers."""
    has_window = hf.get("sliding_window") not in (None, 0, False)
    return {"windows": layer_windows(hf, where, lambda layer: has_window)}


def _qwen_windows(hf: HF, where: str) -> tuple[int | None, ...]:
    """Reads the windows of Qwen: those of `use_sliding_window`, in the layers from `max_window_layers` on."""
    if not flag(hf, "use_sliding_window", where):
        return layer_windows({**hf, "sliding_window": None}, where, lambda layer: False)
    first = hf.get("max_window_layers")
    if type(first) is not int or first < 0:
        raise ConfigError(f"{where}: max_window_layers must be a number of layers, got {first!r}")
    return layer_windows(hf, where, lambda layer: layer >= first)


def _gemma(hf: HF, where: str) -> dict[str, Any]:
    """Reads what Gemma 2 and 3 have in common."""
    spellings = {name: hf[name] for name in ("hidden_activation", "hidden_act") if hf.get(name) is not None}
    activation = require_equal(spellings, where)
    if activation not in ACTIVATIONS:
        raise ConfigError(f"{where}: hidden_activation = {activation!r} is not implemented")
    scalar = positive("query_pre_attn_scalar", hf.get("query_pre_attn_scalar"), where)
    return {
        "activation": activation,
        "attention_scale": None if scalar == hf["head_dim"] else scalar**-0.5,
        "logit_softcap": _softcap("final_logit_softcapping", hf, where),
        "norm_plus_one": True,
        "output_norms": True,
        "embedding_scale": size("hidden_size", hf.get("hidden_size"), where) ** 0.5,
    }


def _gemma2(hf: HF, where: str) -> dict[str, Any]:
    """Reads a window in every other layer, from the first on."""
    softcap = _softcap("attn_logit_softcapping", hf, where)
    windows = layer_windows(hf, where, lambda layer: layer % 2 == 0)
    return _gemma(hf, where) | {"attention_softcap": softcap, "windows": windows}


def _gemma3(hf: HF, where: str) -> dict[str, Any]:
    """Reads a window in all but every `sliding_window_pattern`-th layer, and RoPE of layers with and without one."""
    patterns = {name: hf[name] for name in ("sliding_window_pattern", "_sliding_window_pattern") if hf.get(name)}
    pattern = size("sliding_window_pattern", require_equal(patterns, where) or 6, where)
    ropes = hf.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping) or ropes.keys() - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{where}: rope_parameters must state full_attention and sliding_attention, got {ropes!r}")

    def rope(kind: str, theta: str, default: float, **scaling: Any) -> RopeConfig:
        settings = {"rope_parameters": ropes.get(kind), "rope_theta": hf.get(theta), **scaling}
        if settings["rope_theta"] is None and not (ropes.get(kind) or {}).get("rope_theta"):
            settings["rope_theta"] = default
        return RopeConfig.from_hf(settings, hf.get("max_position_embeddings") or 131072, where)

    local = rope("sliding_attention", "rope_local_base_freq", 1e4)
    if local.by_length:
        raise ConfigError(f"{where}: rope type {local.kind!r} in layers with a window is not implemented")
    return _gemma(hf, where) | {
        "qk_norm": True,
        "windows": layer_windows(hf, where, lambda layer: (layer + 1) % pattern != 0),
        "rope": rope("full_attention", "rope_theta", 1e6, rope_scaling=hf.get("rope_scaling")),
        "local_rope": local,
    }


def _softcap(name: str, hf: HF, where: str) -> float | None:
    """Reads a cap; null and 0 mean none."""
    return positive(name, hf[name], where) if hf.get(name) else None


def _experts(hf: HF, where: str, width: str = "intermediate_size", **others: Any) -> ExpertsConfig:
    """Reads the sizes of the experts: their number under either name, `width` that of the field of their width.

    Args:
      others: the other fields of ExpertsConfig.
    """
    counts = {name: hf[name] for name in EXPERTS if hf.get(name) is not None}
    count = size(EXPERTS[0], require_equal(counts, where), where)
    top_k = size("num_experts_per_tok", hf.get("num_experts_per_tok"), where)
    if top_k > count:
        raise ConfigError(f"{where}: num_experts_per_tok is {top_k}, but there are {count} experts")
    return ExpertsConfig(count, top_k, size(width, hf.get(width), where), **others)


def _mixtral(hf: HF, where: str) -> dict[str, Any]:
    """Reads Mixtral: as Mistral, with experts in all layers and one window for all."""
    return _mistral({**hf, "layer_types": None}, where) | {"experts": _experts(hf, where)}


def _qwen3_moe(hf: HF, where: str) -> dict[str, Any]:
    """Reads Qwen3-MoE: one window for all layers, experts in each `decoder_sparse_step`-th but `mlp_only_layers`."""
    layers = size("num_hidden_layers", hf.get("num_hidden_layers"), where)
    step = size("decoder_sparse_step", hf.get("decoder_sparse_step"), where)
    plain = layer_indices("mlp_only_layers", hf.get("mlp_only_layers") or (), where)
    experts = _experts(
        hf,
        where,
        "moe_intermediate_size",
        normalised=flag(hf, "norm_topk_prob", where),
        dense_layers=tuple(layer for layer in range(layers) if layer in plain or (layer + 1) % step),
    )
    window = hf.get("sliding_window") if flag(hf, "use_sliding_window", where) else None
    return {"qk_norm": True, "experts": experts} | _mistral(
        {**hf, "layer_types": None, "sliding_window": window}, where
    )


def _gpt_oss(hf: HF, where: str) -> dict[str, Any]:
    """Reads gpt-oss: every other layer has a window. Weights may be MXFP4, which conversion turns into numbers."""
    quantization = hf.get("quantization_config")
    if quantization and (not isinstance(quantization, Mapping) or quantization.get("quant_method") != "mxfp4"):
        raise ConfigError(f"{where}: quantization_config = {quantization!r} is not implemented (accepted: mxfp4)")
    clamp = tuple(positive(name, hf.get(name), where) for name in ("swiglu_alpha", "swiglu_limit"))
    return {
        "windows": layer_windows(hf, where, lambda layer: layer % 2 == 0),
        "sinks": True,
        "experts": _experts(hf, where, bias=True, clamp=clamp),
    }


WINDOWS = ("sliding_window", "layer_types")
QWEN_WINDOWS = (*WINDOWS, "use_sliding_window")
GEMMA = (*WINDOWS, "hidden_activation", "hidden_act", "query_pre_attn_scalar", "final_logit_softcapping")
GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
# The norm before the MLP has Llama's path, and not Llama's tensor name.
GEMMA_NAMES = {
    "attention_output_norm": "post_attention_layernorm.weight",
    "post_attention_norm": "pre_feedforward_layernorm.weight",
    "mlp_output_norm": "post_feedforward_layernorm.weight",
}

# Keyed by the `model_type` of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(_mistral, reads=WINDOWS, defaults={"sliding_window": 4096}),
    "qwen2": Architecture(
        lambda hf, where: {"qkv_bias": True, "windows": _qwen_windows(hf, where)},
        reads=QWEN_WINDOWS,
        defaults={"max_window_layers": 28, "sliding_window": 4096},
    ),
    "qwen3": Architecture(
        lambda hf, where: {"qk_norm": True, "windows": _qwen_windows(hf, where)},
        reads=QWEN_WINDOWS,
        defaults={"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096},
    ),
    "gemma2": Architecture(
        _gemma2,
        reads=(*GEMMA, "attn_logit_softcapping"),
        defaults=GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        names=GEMMA_NAMES,
    ),
    "gemma3_text": Architecture(
        _gemma3,
        reads=(*GEMMA, "sliding_window_pattern", "rope_parameters", "rope_theta", "rope_scaling"),
        defaults=GEMMA_DEFAULTS,
        names=GEMMA_NAMES,
    ),
    "mixtral": Architecture(
        _mixtral,
        reads=("sliding_window", *EXPERTS),
        defaults={"rope_theta": 1e6},
        names={
            "mlp.router": "block_sparse_moe.gate.weight",
            "mlp.experts.gate": "block_sparse_moe.experts.{e}.w1.weight",
            "mlp.experts.up": "block_sparse_moe.experts.{e}.w3.weight",
            "mlp.experts.down": "block_sparse_moe.experts.{e}.w2.weight",
        },
    ),
    "qwen3_moe": Architecture(
        _qwen3_moe,
        reads=("sliding_window", "use_sliding_window", *EXPERTS),
        defaults={"sliding_window": 4096, "decoder_sparse_step": 1},
        names={
            "mlp.router": "mlp.gate.weight",
            "mlp.experts.gate": "mlp.experts.{e}.gate_proj.weight",
            "mlp.experts.up": "mlp.experts.{e}.up_proj.weight",
            "mlp.experts.down": "mlp.experts.{e}.down_proj.weight",
        },
    ),
    "gpt_oss": Architecture(
        _gpt_oss,
        reads=(*WINDOWS, *EXPERTS, "quantization_config"),
        defaults={
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        names={
            "attention.sinks": "self_attn.sinks",
            "mlp.router": "mlp.router.weight",
            "mlp.router_bias": "mlp.router.bias",
            "mlp.experts.gate": "mlp.experts.gate_up_proj[gate]",
            "mlp.experts.up": "mlp.experts.gate_up_proj[up]",
            "mlp.experts.down": "mlp.experts.down_proj[down]",
            "mlp.experts.gate_bias": "mlp.experts.gate_up_proj_bias[gate]",
            "mlp.experts.up_bias": "mlp.experts.gate_up_proj_bias[up]",
            "mlp.experts.down_bias": "mlp.experts.down_proj_bias",
        },
    ),
}

# Multimodal models, by `model_type`: that of their text part, and the sizes that its config.json may omit.
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
        },
    ),
}
# Fields of a multimodal model that hold for its text part, too, whatever `text_config` says.
OF_THE_WHOLE = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")
