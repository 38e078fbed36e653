"""Fields of a config.json: which values do not change the forward pass, and readers of single fields.

A table maps a field to its accepted values, and any other value is refused by name. Null and absent fields are always
accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

Table = Mapping[str, tuple[Any, ...]]

# Fields of other architectures and of Llama derivatives, with the values that mean plain Llama.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "eagle", "eagle3"),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
    "sliding_window": (0, False),
    "use_sliding_window": (False,),
    "sliding_window_pattern": (0,),
    "attention_chunk_size": (0,),
    "dual_chunk_attention_config": (),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "rope_interleaved": (False,),
    "interleaved_rope": (False,),
    "no_rope_layers": (),
    "no_rope_layer_interval": (0,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (0,),
    "attn_logit_softcapping": (0, 0.0),
    "final_logit_softcapping": (0, 0.0),
    "logit_cap": (0, 0.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_embeddings": (False,),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "dim_model_base": (),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "alibi": (False,),
    "position_embedding_type": ("rope", "rotary", "absolute"),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "kv_lora_rank": (),
    "q_lora_rank": (),
    "attention_sinks": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "quantization_config": (),
    "norm_type": ("rmsnorm", "rms_norm"),
    "lm_head_bias": (False,),
}


class ConfigError(ValueError):
    """A configuration that is not implemented, or that contradicts itself."""


def refuse_unknown_mathematics(
    hf: Mapping[str, Any], neutral: Table, where: str, place: str = "", reads: Collection[str] = ()
) -> None:
    """Raises ConfigError for a field whose value changes the forward pass in a way that is not implemented.

    Args:
      place: prefix of a nested object's fields in messages, such as "eagle_config."; "" for the top level.
      reads: fields that the caller reads, whatever their values.
    """
    for name, values in neutral.items():
        value = hf.get(name)
        if name in reads or (name == "sliding_window" and hf.get("use_sliding_window") is False):
            continue
        if says_something(value) and value not in values:
            accepted = ", ".join(repr(v) for v in values) or "null"
            raise ConfigError(f"{where}: {place}{name} = {value!r} is not implemented (accepted: {accepted})")
    layer_types = () if "layer_types" in reads else hf.get("layer_types") or ()
    if not isinstance(layer_types, list | tuple) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"{where}: {place}layer_types {layer_types} are not implemented (only full_attention)")


def says_something(value: Any) -> bool:
    """Returns whether a field's value states anything: null, empty lists and empty objects do not."""
    return value is not None and value not in ([], (), {})


def require_equal(found: Mapping[str, Any], where: str) -> Any:
    """Returns the value of a field that is stated under several names, {name: value}; None if `found` is empty.

    Raises:
      ConfigError: naming two values that differ.
    """
    (first, value), *others = list(found.items()) or [("", None)]
    for name, other in others:
        if other != value or isinstance(other, bool) != isinstance(value, bool):
            raise ConfigError(f"{where}: {first} = {value!r} and {name} = {other!r} contradict each other; keep one")
    return value


def size(name: str, value: Any, where: str) -> int:
    """Returns the value if it is a positive integer; else raises ConfigError."""
    if value is None:
        raise ConfigError(f"{where}: {name} is missing")
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value


def flag(hf: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    """Reads a bool; null and absent mean the default."""
    value = hf.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name} must be true or false, got {value!r}")
    return value


def positive(name: str, value: Any, where: str) -> float:
    """Returns the value as a float if it is a positive number; else raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{where}: {name} must be a positive number, got {value!r}")
    return float(value)


def layer_indices(name: str, value: Any, where: str) -> tuple[int, ...]:
    """Returns the value if it is a list of layer indices, which may be empty; else raises ConfigError."""
    valid = isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)
    if not valid:
        raise ConfigError(f"{where}: {name} must list layer indices, got {value!r}")
    return tuple(value)


def joined(*tables: Iterable[str]) -> frozenset[str]:
    """Returns the union of the tables' names."""
    return frozenset(name for table in tables for name in table)
