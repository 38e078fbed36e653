"""Checksums of models, configs and tokenizers, to detect files computed from different inputs."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.files import checksums
from eagle_jax.sharding import path_name

# The config fields when fingerprints were first stored. They are always part of the text, so that stored fingerprints
# stay valid; a field that was added later is included only where it differs from its default.
FIRST_FIELDS = {
    "RopeConfig": "theta kind factor low_freq_factor high_freq_factor original_length",
    "LlamaConfig": (
        "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim rms_norm_eps rope "
        "max_position_embeddings tie_word_embeddings attention_bias mlp_bias"
    ),
    "MedusaConfig": "vocab_size hidden_size num_heads num_blocks",
    "TreeConfig": "depth top_k num_nodes stop_below score_temperature",
    "StaticTree": "paths",
    "SamplingConfig": "temperature top_k top_p min_p repetition_penalty logit_bias coupled",
}
FIRST_FIELDS["DraftConfig"] = FIRST_FIELDS["LlamaConfig"] + (
    " draft_vocab_size target_hidden_size taps norm_before_residual own_embedding fc_bias qkv_bias window"
)


def of_config(config: Any) -> str:
    """Returns a config as text that does not change when a field with a default is added; else its repr."""
    kind = type(config)
    if not dataclasses.is_dataclass(kind) or not any(base.__module__.startswith("eagle_jax.") for base in kind.__mro__):
        return repr(config)
    name = next((base.__name__ for base in kind.__mro__ if base.__name__ in FIRST_FIELDS), kind.__name__)
    fields = {field.name: of_config(getattr(config, field.name)) for field in dataclasses.fields(kind)}
    first = [field for field in FIRST_FIELDS.get(name, "").split() if field in fields]
    newer = [
        field.name for field in dataclasses.fields(kind) if field.name not in first and not _is_default(config, field)
    ]
    shown = ", ".join(f"{field}={fields[field]}" for field in [*first, *sorted(newer)])
    return f"{name}({shown})"


def _is_default(config: Any, field: dataclasses.Field[Any]) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return default is not dataclasses.MISSING and of_config(getattr(config, field.name)) == of_config(default)


def of_model(model: Any) -> str:
    """Returns the checksum of a model's config and parameters, whatever its devices and sharding."""
    parts = [of_config(getattr(model, "config", None))]
    tied = getattr(getattr(getattr(model, "model", model), "config", None), "tie_word_embeddings", False)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        if tied and path_name(path).endswith("lm_head"):
            continue  # a transposed copy of a tied embedding, which `input_first` adds
        sums = np.asarray(_checksums(leaf)).tolist()
        parts.append(f"{jax.tree_util.keystr(path)} {leaf.dtype.name} {list(leaf.shape)} {sums}")
    return checksums.of_text("\n".join(parts))


def of_tokenizer(tokenizer: Any) -> str:
    """Returns the checksum of a tokenizer with its chat template."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:  # a slow tokenizer is Python code and cannot be serialised: use its class and vocabulary
        content = [type(tokenizer).__name__, of_vocabulary(tokenizer), tokenizer.special_tokens_map]
    return checksums.of_text(json.dumps([content, tokenizer.chat_template]))


def of_vocabulary(tokenizer: Any) -> str:
    """Returns 16 characters for a tokenizer's tokens and ids, independent of the version of its library."""
    return _of_vocabulary(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=4)
def _of_vocabulary(tokenizer: Any, size: int) -> str:
    del size  # only a cache key: adding tokens must invalidate the entry
    return checksums.of_text(json.dumps(sorted(tokenizer.get_vocab().items())))[:16]


@jax.jit
def _checksums(array: jax.Array) -> jax.Array:
    """Returns two sums [2] uint32 of the entries' bits, hashed with their indices.

    Integer sums do not depend on the order of the reduction, hence not on the sharding.
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):  # per-axis iota: a reshape would all-gather a sharded array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return jnp.stack([mixed.sum(), (mixed * (place | 1)).sum()])
