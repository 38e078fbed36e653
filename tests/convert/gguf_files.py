"""Small GGUF files, written by the package gguf: the inputs of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from eagle_jax.convert import names
from tests.convert import folders
from tests.convert.folders import CONFIG, Arrays

KEYS: dict[str, Any] = {
    "llama.vocab_size": 16,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 6,
    "llama.attention.value_length": 6,
    "llama.rope.dimension_count": 6,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500.0,
}
WIDE = {  # of rows that divide into blocks of 32
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.rope.dimension_count": 16,
}
LAYER = [path for path in names.LAYER if f"layers.{{i}}.{path}" in names.GGUF]  # no norms of queries and keys
# The official tensor's name -> the file's; and how the rows of queries and keys are interleaved.
NAMES = {
    names.official_name(names.LLAMA, path): names.official_name(names.GGUF, path)
    for path in (*(f"layers.{i}.{rest}" for i in range(2) for rest in LAYER), "embed", "norm", "lm_head")
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Pairs the two halves of every head, as the converter of llama.cpp does."""
    first, second = np.split(rows.reshape(heads, -1, *rows.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def of_official(arrays: Arrays, heads: int = 2, kv_heads: int = 1) -> Arrays:
    """Arrays of a Hugging Face folder, under the names and in the order of a GGUF file."""
    found = {}
    for name, array in arrays.items():
        count = heads if ".q_proj." in name else kv_heads if ".k_proj." in name else 0
        found[NAMES[name]] = interleaved(array, count) if count else array
    return found


def write(path: Path, arrays: Arrays, keys: dict[str, Any], kinds: dict[str, Any] | None = None) -> Path:
    """Writes a file.

    Args:
      keys: the metadata; None leaves a key of KEYS out.
      kinds: {name: quantisation}; an array without one stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, keys.get("general.architecture", "llama"))
    for key, value in keys.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    for name, array in arrays.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(path: Path, keys: dict[str, Any] | None = None, arrays: Arrays | None = None) -> Path:
    """Writes the model of `folders.CONFIG`."""
    return write(path, of_official(folders.llama_arrays()) if arrays is None else arrays, KEYS | (keys or {}))


def wide_arrays() -> Arrays:
    """The tensors of a model of the sizes in WIDE, under the file's names."""
    rng = np.random.default_rng(5)
    layer = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (64, 32),
        "attn_k": (32, 32),
        "attn_v": (32, 32),
        "attn_output": (32, 64),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (16, 32), "output_norm.weight": (32,)}
    return {name: folders.normal(rng, shape) for name, shape in shapes.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


assert CONFIG["head_dim"] == KEYS["llama.attention.key_length"]
