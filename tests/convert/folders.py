"""Small checkpoints, written as the official tools write them: the inputs of these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from eagle_jax.convert.read import open_checkpoint

Arrays = dict[str, np.ndarray]

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,  # N * H = 12 is not D = 8, so a transposed q or o shows
    "vocab_size": 16,
    "torch_dtype": "float32",
}
HEAD_CONFIG = CONFIG | {"num_hidden_layers": 1, "draft_vocab_size": 5}
# As published: no sizes, and a number of heads that is not the file's.
MEDUSA_CONFIG = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "some/target"}
DRAFT_IDS = np.array([1, 2, 5, 11, 15])


def layer(prefix: str, rng: np.random.Generator, width: int = 8) -> Arrays:
    shapes = {
        "self_attn.q_proj": (12, width),
        "self_attn.k_proj": (6, width),
        "self_attn.v_proj": (6, width),
        "self_attn.o_proj": (8, 12),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
        "post_attention_layernorm": (8,),
    }
    return {f"{prefix}.{name}.weight": normal(rng, shape) for name, shape in shapes.items()}


def llama_arrays(layers: int = 2, vocab: int = 16) -> Arrays:
    rng = np.random.default_rng(0)
    arrays = {name: normal(rng, (vocab, 8)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for i in range(layers):
        arrays |= layer(f"model.layers.{i}", rng)
        arrays[f"model.layers.{i}.input_layernorm.weight"] = normal(rng, (8,))
    return arrays | {"model.norm.weight": normal(rng, (8,))}


def eagle3_arrays(prefix: str = "midlayer") -> Arrays:
    rng = np.random.default_rng(1)
    arrays = {
        "fc.weight": normal(rng, (8, 24)),
        "norm.weight": normal(rng, (8,)),
        "lm_head.weight": normal(rng, (5, 8)),
    }
    arrays |= layer(prefix, rng, width=16)
    arrays |= {f"{prefix}.{name}.weight": normal(rng, (8,)) for name in ("hidden_norm", "input_layernorm")}
    t2d = np.zeros(16, np.bool_)
    t2d[DRAFT_IDS] = True
    return arrays | {"d2t": DRAFT_IDS - np.arange(5), "t2d": t2d}


def eagle1_arrays() -> Arrays:
    rng = np.random.default_rng(2)
    arrays = {
        "embed_tokens.weight": normal(rng, (16, 8)),
        "fc.weight": normal(rng, (8, 16)),
        "fc.bias": normal(rng, (8,)),
    }
    return arrays | layer("layers.0", rng)


def medusa_arrays(heads: int = 3, blocks: int = 1, prefix: str = "medusa_head.") -> Arrays:
    rng = np.random.default_rng(4)
    arrays = {}
    for i in range(heads):
        for j in range(blocks):
            arrays[f"{prefix}{i}.{j}.linear.weight"] = normal(rng, (8, 8))
            arrays[f"{prefix}{i}.{j}.linear.bias"] = normal(rng, (8,))
        arrays[f"{prefix}{i}.{blocks}.weight"] = normal(rng, (16, 8))
    return arrays


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def write_safetensors(
    folder: Path, config: dict[str, Any], arrays: Arrays, *, shards: int = 1, index: bool | None = None
) -> Path:
    """One file, or shards; `index` is written for shards by default."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = shard_names("model", "safetensors", shards)
    for name, part in zip(names, split(arrays, shards), strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    if shards > 1 if index is None else index:
        write_index(folder / "model.safetensors.index.json", names, arrays)
    return folder


def write_bin(folder: Path, config: dict[str, Any], arrays: Arrays, *, shards: int = 1, zipped: bool = True) -> Path:
    """One file, or shards with an index; `zipped` False is the format from before PyTorch 1.6."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = shard_names("pytorch_model", "bin", shards)
    for name, part in zip(names, split(arrays, shards), strict=True):
        state = {key: as_torch(array) for key, array in part.items()}
        torch.save(state, folder / name, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        write_index(folder / "pytorch_model.bin.index.json", names, arrays)
    return folder


def write_medusa(
    folder: Path, arrays: Arrays, config: dict[str, Any] = MEDUSA_CONFIG, *, file: str = "medusa_lm_head.pt"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(arrays, folder / file, metadata={"format": "pt"})
    else:
        torch.save({key: as_torch(array) for key, array in arrays.items()}, folder / file)
    return folder


def shard_names(stem: str, suffix: str, shards: int) -> list[str]:
    if shards == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]


def split(arrays: Arrays, shards: int) -> list[Arrays]:
    items = list(arrays.items())
    return [dict(items[i::shards]) for i in range(shards)]


def write_index(path: Path, names: list[str], arrays: Arrays) -> None:
    parts = zip(names, split(arrays, len(names)), strict=True)
    path.write_text(json.dumps({"weight_map": {key: name for name, part in parts for key in part}}))


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def read_arrays(folder: Path) -> Arrays:
    """Every tensor of a folder, as it is in the file."""
    return {name: np.array(tensor.load()) for name, tensor in open_checkpoint(folder).tensors.items()}


def assert_same(ours: Arrays, theirs: Arrays) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype), name
        assert ours[name].tobytes() == array.tobytes(), name
