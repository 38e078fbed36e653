"""Experts as checkpoints store them: read, refused by name, and MXFP4 against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from eagle_jax.convert import CheckpointError, convert, experts, from_pretrained, load, to_official
from eagle_jax.models import params

CONFIG = dict(
    vocab_size=7,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_experts_per_tok=1,
    num_local_experts=2,
    torch_dtype="float32",
)
GPT_OSS = CONFIG | dict(model_type="gpt_oss", quantization_config=dict(quant_method="mxfp4"))
MIXTRAL = CONFIG | dict(model_type="mixtral")
PACKED = "model.layers.0.mlp.experts"
W2 = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"


def attention_arrays(bias: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(7, 32)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for name, shape in {"q": (8, 32), "k": (4, 32), "v": (4, 32), "o": (32, 8)}.items():
        arrays[f"model.layers.0.self_attn.{name}_proj.weight"] = rng.normal(size=shape)
        if bias:
            arrays[f"model.layers.0.self_attn.{name}_proj.bias"] = rng.normal(size=shape[:1])
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    arrays |= {f"{name}.weight": rng.normal(size=32) for name in norms}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def gpt_oss_arrays() -> dict[str, np.ndarray]:
    """Weights of the experts as bytes, with all 4-bit floats and the largest and smallest scales among them."""
    rng = np.random.default_rng(1)
    shapes = {"mlp.router.weight": (2, 32), "mlp.router.bias": (2,), "self_attn.sinks": (2,)}
    arrays = {f"model.layers.0.{name}": rng.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {
        f"{PACKED}.gate_up_proj_bias": rng.normal(size=(2, 64)),
        f"{PACKED}.down_proj_bias": rng.normal(size=(2, 32)),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        arrays[f"{PACKED}.{name}_blocks"] = rng.integers(0, 256, (2, rows, 1, 16), np.uint8)
        scales = rng.integers(117, 130, (2, rows, 1), np.uint8)
        scales[0, :2, 0] = 0, 252
        arrays[f"{PACKED}.{name}_scales"] = scales
    return attention_arrays(bias=True) | arrays


def mixtral_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    arrays = attention_arrays(bias=False) | {"model.layers.0.block_sparse_moe.gate.weight": rng.normal(size=(2, 32))}
    for expert in range(2):
        arrays |= {W2.format(expert).replace("w2", name): rng.normal(size=(32, 32)) for name in ("w1", "w2", "w3")}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def folder(path: Path, config: dict, arrays: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path / "model.safetensors")
    return path


def fused(kind: str) -> torch.nn.Module:
    sizes = {name: value for name, value in CONFIG.items() if name not in ("torch_dtype", "num_local_experts")}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=2, moe_intermediate_size=6))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_tensors_of_all_experts(kind: str, tmp_path: Path):
    """transformers writes either form; both are one model."""
    model = fused(kind)
    for form in (True, False):
        model.save_pretrained(tmp_path / str(form), save_original_format=form)
    each, together = (from_pretrained(tmp_path / str(form), None)[0] for form in (True, False))
    together_leaves = params.flatten(together)
    for path, leaf in params.flatten(each).items():
        np.testing.assert_array_equal(leaf, together_leaves[path], err_msg=path)
    stored = {name: array.numpy() for name, array in load_file(tmp_path / "False" / "model.safetensors").items()}
    assert f"{PACKED}.gate_up_proj" in stored
    for change, message in (
        ({f"{PACKED}.gate_up_proj": np.ones((2, 7, 32), np.float32)}, "does not divide into 2 parts"),
        ({f"{PACKED}.down_proj": np.ones((32, 32), np.float32)}, "does not divide into 1 parts"),
        ({f"{PACKED}.gate_up_bias": np.ones(3, np.float32)}, "has no place"),
    ):
        broken = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder(broken, json.loads((tmp_path / "False" / "config.json").read_text()), stored | change)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(broken, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_weights_are_those_that_transformers_reads(tmp_path, dtype):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    arrays = gpt_oss_arrays()
    plain = {name: array for name, array in arrays.items() if "_blocks" not in name and "_scales" not in name}
    for name in ("gate_up_proj", "down_proj"):
        parts = (torch.from_numpy(arrays[f"{PACKED}.{name}_{part}"]) for part in ("blocks", "scales"))
        plain[f"{PACKED}.{name}"] = mxfp4.convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()
    got, _ = from_pretrained(folder(tmp_path / "mxfp4", GPT_OSS, arrays), dtype=dtype)
    wanted, _ = from_pretrained(folder(tmp_path / "plain", GPT_OSS, plain), dtype=dtype)
    for path, array in params.flatten(wanted).items():
        np.testing.assert_array_equal(params.flatten(got)[path], array, err_msg=path)
    if dtype == "float32":  # and back, unpacked
        written = to_official(got)
        assert written.keys() == plain.keys()
        for name, array in plain.items():
            np.testing.assert_array_equal(written[name], array, err_msg=name)


@pytest.mark.parametrize("config", [GPT_OSS, MIXTRAL], ids=lambda config: config["model_type"])
def test_a_converted_folder_holds_the_same(config, tmp_path):
    source = folder(tmp_path / "source", config, gpt_oss_arrays() if config is GPT_OSS else mixtral_arrays())
    convert(source, None, tmp_path / "converted")
    loaded, read = (params.flatten(model) for model, _ in (load(tmp_path / "converted"), from_pretrained(source)))
    assert loaded.keys() == read.keys()
    for path, array in read.items():
        np.testing.assert_array_equal(loaded[path], array, err_msg=path)


def test_every_byte_and_scale_is_exact():
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([values, -values])
    for scale in (0, 1, 127, 252):
        got = experts.dequantised(blocks, np.full((1, 1, 16), scale, np.uint8)).reshape(256, 2).astype(np.float64)
        wanted = np.stack([values[np.arange(256) % 16], values[np.arange(256) // 16]], axis=-1) * 2.0 ** (scale - 127)
        np.testing.assert_array_equal(got, wanted)


def _without(arrays, name):
    return {other: array for other, array in arrays.items() if other != name}


BLOCKS, SCALES = f"{PACKED}.down_proj_blocks", f"{PACKED}.down_proj_scales"
DAMAGED = {
    "no scales": (GPT_OSS, lambda a: _without(a, SCALES), f"tensor '{SCALES}' is missing"),
    "neither": (GPT_OSS, lambda a: _without(_without(a, SCALES), BLOCKS), f"tensor '{PACKED}.down_proj' is missing"),
    "fewer scales": (
        GPT_OSS,
        lambda a: a | {SCALES: a[SCALES][:, :3]},
        r"down_proj_blocks' is uint8 .* MXFP4 has bytes",
    ),
    "floats": (GPT_OSS, lambda a: a | {BLOCKS: a[BLOCKS].astype(np.float32)}, "down_proj_blocks' is float32"),
    "huge": (GPT_OSS, lambda a: a | {SCALES: np.full_like(a[SCALES], 255)}, "down_proj.* holds NaN or infinity"),
    "fewer outputs": (
        GPT_OSS,
        lambda a: a | {BLOCKS: a[BLOCKS][:, :8], SCALES: a[SCALES][:, :8]},
        r"down_proj\[down\]' has shape \(2, 8, 32\), config.json asks for \(2, 32, 32\)",
    ),
    "both": (
        GPT_OSS,
        lambda a: a | {f"{PACKED}.down_proj": np.zeros((2, 32, 32), np.float32)},
        "down_proj' has no place in the model",
    ),
    "a matrix less": (MIXTRAL, lambda a: _without(a, W2.format(1)), f"tensor '{W2.format(1)}' is missing"),
    "an expert more": (MIXTRAL, lambda a: a | {W2.format(2): a[W2.format(1)]}, "experts.2.w2.weight' has no place"),
    "another shape": (
        MIXTRAL,
        lambda a: a | {W2.format(1): a[W2.format(1)][:8]},
        r"experts.1.w2.weight' is float32 \(8, 32\), but .*experts.0.w2.weight' is float32 \(32, 32\)",
    ),
    "another dtype": (
        MIXTRAL,
        lambda a: a | {W2.format(1): a[W2.format(1)].astype(ml_dtypes.bfloat16)},
        "experts.1.w2.weight' is bfloat16",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_experts_are_refused_by_name(case, tmp_path):
    config, damage, message = DAMAGED[case]
    arrays = gpt_oss_arrays() if config is GPT_OSS else mixtral_arrays()
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder(tmp_path / "target", config, damage(arrays)))
