"""Writes the config.json of a GGUF file's model from its metadata. A key that is not understood is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.gguf.header import Header
from eagle_jax.convert.gguf.tensors import PLAIN
from eagle_jax.models.fields import ConfigError

ARCHITECTURE = "llama"
THETA = 10000.0  # where a file names no base
OUTPUT, ROPE_FACTORS = "output.weight", "rope_freqs.weight"

# Keys below "llama.", and the fields of config.json that they are.
SIZES = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
REQUIRED = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
ROPE = ("rope.dimension_count", "rope.scale_linear")
SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
# Keys whose only accepted values leave the forward pass as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the order of rows that `tensors.ROTATED` undoes
    "use_parallel_residual": (False,),
    "rope.scaling.finetuned": (True, False),  # says how the model was trained
}
# Keys below "tokenizer.ggml.", and the fields of config.json that they are; the ends of a text may be several.
SPECIAL = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_of(header: Header, rope_factors: Callable[[], np.ndarray]) -> dict[str, Any]:
    """Returns the config.json that a Hugging Face folder of this model would hold.

    Args:
      rope_factors: reads the tensor ROPE_FACTORS; called where the file has it.
    Raises:
      CheckpointError: another architecture, or a value that is missing.
      ConfigError: mathematics that is not implemented, by the key's name.
    """
    metadata, path = header.metadata, header.path
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path}: holds a model of architecture {architecture!r}; of GGUF files, only {ARCHITECTURE!r} is read"
        )
    prefix = f"{ARCHITECTURE}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    _refuse(own, str(path))
    for key in REQUIRED:
        if key not in own:
            raise CheckpointError(f"{path}: its metadata has no {prefix}{key}; the file is damaged, download it again")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": OUTPUT not in header.entries,
        "attention_bias": "blk.0.attn_q.bias" in header.entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.entries,
        "dtype": _dtype(header),
        **{SIZES[key]: _one(value, f"{path}: {prefix}{key}") for key, value in own.items() if key in SIZES},
    }
    config |= special_ids(metadata)
    if "vocab_size" not in config:
        config["vocab_size"] = _rows(header)
    scaling = _scaling(own, str(path))
    if ROPE_FACTORS in header.entries:
        if scaling:
            raise ConfigError(f"{path}: {ROPE_FACTORS} beside {prefix}rope.scaling is not implemented")
        scaling = llama3_scaling(rope_factors(), _head_dim(config), config.get("rope_theta", THETA), str(path))
    rotated = own.get("rope.dimension_count")
    if rotated not in (None, _head_dim(config)):
        raise ConfigError(
            f"{path}: {prefix}rope.dimension_count = {rotated!r} of a head of {_head_dim(config)} is not implemented"
        )
    return config | ({"rope_scaling": scaling} if scaling else {})


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ids of special tokens by their fields of config.json."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key in (*SPECIAL, *ENDS)}
    fields: dict[str, Any] = {field: ids[key] for key, field in SPECIAL.items() if type(ids[key]) is int}
    ends = list(dict.fromkeys(ids[key] for key in ENDS if type(ids[key]) is int))
    return fields | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _refuse(own: Mapping[str, Any], where: str) -> None:
    """Refuses unknown keys, and known keys whose values change the forward pass."""
    for key, value in own.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise ConfigError(f"{where}: {ARCHITECTURE}.{key} = {value!r} is not implemented")
        if key not in (*SIZES, *SCALING, *ROPE, *NEUTRAL, "attention.value_length"):
            raise ConfigError(f"{where}: the key {ARCHITECTURE}.{key} is not known, so its effect is not implemented")
    if own.get("attention.value_length", own.get("attention.key_length")) != own.get("attention.key_length"):
        raise ConfigError(f"{where}: attention.key_length and attention.value_length differ, which is not implemented")


def _one(value: Any, where: str) -> Any:
    """Returns a number that a file may repeat for each layer; refuses layers that differ."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ConfigError(f"{where} differs from layer to layer, which is not implemented")
    return value[0]


def _rows(header: Header) -> int:
    entry = header.entries.get("token_embd.weight")
    if entry is None or not entry.shape:
        raise CheckpointError(f"{header.path}: tensor 'token_embd.weight' is missing; the file is incomplete")
    return entry.shape[0]


def _dtype(header: Header) -> str:
    """Returns float16 or bfloat16 if all matrices have it, else float32, which holds dequantised values exactly."""
    found = {entry.type for entry in header.entries.values() if len(entry.shape) > 1}
    name = PLAIN[found.pop()].name if len(found) == 1 and found <= PLAIN.keys() else "float32"
    return name if name in ("float16", "bfloat16") else "float32"


def _head_dim(config: Mapping[str, Any]) -> Any:
    """Returns the size of a head; None for invalid sizes, which the config's reader refuses."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    sizes = type(heads) is int and type(hidden) is int and heads > 0
    return config.get("head_dim", hidden // heads if sizes else None)


def _scaling(own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the rope_scaling of the metadata.

    Raises:
      ConfigError: for a kind whose metadata is not read, such as yarn, which has factors of its own there.
    """
    if "rope.scale_linear" in own:  # of old files
        return {"rope_type": "linear", "factor": own["rope.scale_linear"]} if own["rope.scale_linear"] != 1.0 else {}
    kind = own.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(f"{where}: rope type {kind!r} of a GGUF file is not implemented (accepted: none, linear)")
    if kind == "none":
        return {}
    return {field: own[key] for key, field in SCALING.items() if key in own}


def llama3_scaling(factors: np.ndarray, head_dim: int, theta: float, where: str) -> dict[str, Any]:
    """Recovers the settings of Llama 3's scaling: a file holds only the divisors of the frequencies.

    With s = (L f / 2 pi - low) / (high - low) for a frequency f, clipped to 0..1, a divisor is
    1 / ((1 - s) / factor + s). Only L / (high - low) and low / (high - low) can be known from it; low is taken as 1.

    Args:
      factors: [head_dim / 2].
    Raises:
      ConfigError: if no settings give these divisors.
    """
    divisors = factors.astype(np.float64).reshape(-1)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    unknown = ConfigError(f"{where}: the divisors in {ROPE_FACTORS} are not those of Llama 3's scaling")
    if divisors.shape != frequencies.shape or not np.isfinite(divisors).all() or (divisors < 1).any():
        raise unknown
    factor = float(str(np.float32(divisors.max())))
    if factor == 1.0:
        return {}
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if between.sum() < 2:
        raise unknown
    slope, shift = np.polyfit(frequencies[between], smooth[between], 1)
    if slope <= 0 or shift >= 0:
        raise unknown
    low, high = 1.0, round(1 - 1 / shift, 3)
    length = round(2 * math.pi * slope * (high - low))
    again = np.clip((length * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - again) / factor + again), divisors, rtol=1e-5):
        raise unknown
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
