"""MLC-LLM's folders: an index, shards of fused tensors, and the config of its chat; written here as it writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from eagle_jax.convert import convert, from_pretrained, load, to_official
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.loading import load_draft
from tests.convert import folders
from tests.convert.folders import CONFIG, Arrays, assert_same
from tests.convert.reading import fused

# Its dataclass of a Llama, with 0 for what config.json did not state.
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "position_embedding_base": 500000.0,
    "rope_scaling": None,
    "context_window_size": 64,
    "prefill_chunk_size": 64,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "tensor_parallel_shards": 1,
    "pipeline_parallel_stages": 1,
    "max_batch_size": 128,
    "disaggregation": False,
    "kwargs": {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": "float16"},
    "bias": True,
}
INDEX, CHAT = "ndarray-cache.json", "mlc-chat-config.json"


def write(folder: Path, arrays: Arrays, quantization: str = "q0f32", index: str = INDEX, **fields: Any) -> Path:
    """Two shards; float32 is stored as bfloat16, as convert_weight does."""
    folder.mkdir()
    chat = {"model_type": "eagle", "quantization": quantization, "model_config": SIZES, "temperature": 0.7} | fields
    (folder / CHAT).write_text(json.dumps(chat))
    shards = []
    for number, part in enumerate(folders.split(arrays, 2)):
        data, records = b"", []
        for name, array in part.items():
            stored = array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array
            entry = {"name": name, "shape": list(array.shape), "dtype": array.dtype.name, "format": "f32-to-bf16"}
            records.append(entry | {"nbytes": stored.nbytes, "byteOffset": len(data)})
            data += stored.tobytes()
        (folder / f"params_shard_{number}.bin").write_bytes(data)
        shard = {"dataPath": f"params_shard_{number}.bin", "format": "raw-shard", "nbytes": len(data)}
        shards.append(shard | {"records": records, "md5sum": "0" * 32})
    (folder / index).write_text(json.dumps({"metadata": {"ParamSize": len(arrays)}, "records": shards}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write_safetensors(tmp_path_factory.mktemp("target"), CONFIG, folders.llama_arrays())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_head_in_every_float_format(stored: str, model: Path, tmp_path: Path):
    """float32 has lost what bfloat16 does not hold; the rest is bit for bit the head that was converted."""
    through = ml_dtypes.bfloat16 if stored == "float32" else np.dtype(stored)
    arrays = {name: array.astype(through).astype(stored) for name, array in folders.eagle1_arrays().items()}
    quantization = {"float32": "q0f32", "float16": "q0f16", "bfloat16": "q0bf16"}[stored]
    index = "tensor-cache.json" if stored == "float16" else INDEX
    head = write(tmp_path / "head", fused(arrays), quantization, index)
    target, draft = from_pretrained(model, head)
    expected = {name: array.astype(np.float32) for name, array in arrays.items()}
    out = convert(model, head, tmp_path / "out")
    for one in (draft, load_draft(head, target), load(out)[1]):
        assert_same(to_official(one), expected)
        assert one.config.rope.theta == 5e5 and one.config.max_position_embeddings == 64
    said: list[str] = []
    convert(model, head, out, note=said.append)
    assert "holds this conversion already" in said[0]


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def entry(index: dict[str, Any]) -> dict[str, Any]:
    return index["records"][0]["records"][0]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: (f / "params_shard_1.bin").unlink(), "params_shard_1.bin: this shard, which holds"),
    "shard cut": (lambda f: (f / "params_shard_0.bin").write_bytes(b"12"), "params_shard_0.bin: has 2 bytes, "),
    "both missing": (lambda f: [file.unlink() for file in f.glob("*.bin")], "names no shard that is there"),
    "index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: not valid JSON"),
    "no records": (changed(lambda index: index.pop("records")), "the index has no list of records"),
    "no entries": (changed(lambda index: index["records"][1].pop("records")), "params_shard_1.bin has no list of"),
    "outside": (changed(lambda index: index["records"][0].update(dataPath="../a.bin")), "'../a.bin', which is no .bin"),
    "format": (changed(lambda index: index["records"][0].update(format="zip")), "has format 'zip'"),
    "size": (changed(lambda index: index["records"][0].update(nbytes="1")), "has nbytes '1'"),
    "shape": (changed(lambda index: entry(index).update(shape=[3, -1])), "has a malformed entry"),
    "name": (changed(lambda index: entry(index).update(name=None)), "has a malformed entry"),
    "offset": (changed(lambda index: entry(index).update(byteOffset=1 << 40)), "bytes at 1099511627776 of"),
    "bytes": (changed(lambda index: entry(index).update(nbytes=3)), "has 3 bytes at 0 of"),
    "dtype": (changed(lambda index: entry(index).update(dtype="e4m3_float8")), "is of dtype 'e4m3_float8'"),
    "encoding": (changed(lambda index: entry(index).update(format="zip")), "format 'zip', which are not read"),
    "twice": (changed(lambda index: index["records"].append(index["records"][0])), "is listed twice"),
    "no config": (lambda f: (f / CHAT).unlink(), f"{CHAT}: cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(damage: str, model: Path, tmp_path: Path):
    change, message = DAMAGE[damage]
    head = write(tmp_path / "head", fused(folders.eagle1_arrays()))
    change(head)
    with pytest.raises(CheckpointError) as raised:
        from_pretrained(model, head)
    assert message in str(raised.value)


def test_what_is_not_read(model: Path, tmp_path: Path):
    arrays = fused(folders.eagle1_arrays())
    with pytest.raises(CheckpointError, match=r"'q4f16_1' is not implemented .*; name the head"):
        from_pretrained(model, write(tmp_path / "quantized", arrays, "q4f16_1"))
    with pytest.raises(CheckpointError, match="model_type is 'llama'; of MLC's folders only EAGLE heads"):
        from_pretrained(write(tmp_path / "llama", arrays, model_type="llama"))
    name = "layers.0.self_attn.qkv_proj"
    words = arrays.pop(f"{name}.weight").view(np.uint32)
    with pytest.raises(CheckpointError, match=f"'{name}.q_weight' belongs to quantized weights"):
        from_pretrained(model, write(tmp_path / "words", arrays | {f"{name}.q_weight": words}))
    with pytest.raises(ValueError, match="sliding_window_size = 32 is not known"):
        sizes = SIZES | {"sliding_window_size": 32}
        from_pretrained(model, write(tmp_path / "window", fused(folders.eagle1_arrays()), model_config=sizes))
