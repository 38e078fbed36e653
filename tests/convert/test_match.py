"""A checkpoint against the model of its config: what must be there, what may be, and every contradiction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.match import BLOCK, finite_values, match_pair
from eagle_jax.convert.read import Tensor
from eagle_jax.drafts.medusa import MedusaConfig
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from tests.convert.folders import (
    CONFIG,
    DRAFT_IDS,
    HEAD_CONFIG,
    Arrays,
    eagle1_arrays,
    eagle3_arrays,
    llama_arrays,
    medusa_arrays,
    write_bin,
    write_medusa,
    write_safetensors,
)

Q, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"


def read_all(target: Path, draft: Path | None, dtype: str | None = None) -> None:
    for match in match_pair(target, draft, dtype):
        for path in params.flatten(match.model) if match is not None else ():
            match.read(path)


def put(name: str, array: np.ndarray) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: array})


def fill(name: str, value: float) -> Callable[[Arrays], object]:
    def edit(arrays: Arrays) -> None:
        arrays[name].flat[-1] = value

    return edit


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(edit(arrays[name]))})


TARGET_DAMAGE = {
    "missing": (lambda a: a.pop(Q), f"'{Q}' is missing"),
    "two missing": (lambda a: (a.pop(Q), a.pop(EMBED)), f"'{EMBED}' .and 1 more. are missing"),
    "extra": (put("model.layers.0.self_attn.q_norm.weight", np.ones(6, np.float32)), "q_norm.weight' has no place"),
    "extra layer": (put("model.layers.2.input_layernorm.weight", np.ones(8, np.float32)), "layers.2.* has no place"),
    "bias without attention_bias": (put(Q.replace("weight", "bias"), np.ones(12, np.float32)), "q_proj.bias'"),
    "transposed": (change(Q, np.transpose), rf"'{Q}' has shape \(8, 12\), config.json asks for \(12, 8\)"),
    "flattened": (change(Q, np.ravel), rf"'{Q}' has shape \(96,\)"),
    "heads split": (change(Q, lambda q: q.reshape(2, 6, 8)), rf"'{Q}' has shape \(2, 6, 8\)"),
    "other vocabulary": (change(EMBED, lambda e: e[:15]), rf"'{EMBED}' has shape \(15, 8\).*\(16, 8\)"),
    "integers": (change(Q, lambda q: q.astype(np.int32)), f"'{Q}' is of dtype int32"),
    "NaN": (fill(Q, np.nan), f"'{Q}' holds NaN or infinity"),
    "infinity": (fill(Q, np.inf), f"'{Q}' holds NaN or infinity"),
    "minus infinity": (fill("model.norm.weight", -np.inf), "'model.norm.weight' holds NaN or infinity"),
}


@pytest.mark.parametrize("damage", TARGET_DAMAGE)
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_damaged_targets(tmp_path: Path, write: Callable[..., Path], damage: str):
    arrays = llama_arrays()
    read_all(write(tmp_path / "intact", CONFIG, arrays), None)
    edit, message = TARGET_DAMAGE[damage]
    edit(arrays)
    folder = write(tmp_path / "damaged", CONFIG, arrays)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        read_all(folder, None)


OFFSETS = eagle3_arrays()["d2t"]
EAGLE3_DAMAGE = {
    "no d2t": (lambda a: a.pop("d2t"), "d2t is missing"),
    "d2t of another length": (change("d2t", lambda d: d[:4]), r"'d2t' has shape \(4,\).*\(5,\)"),
    "d2t of floats": (change("d2t", lambda d: d.astype(np.float32)), "'d2t' is of dtype float32"),
    "d2t past the vocabulary": (put("d2t", DRAFT_IDS + 1 - np.arange(5)), "d2t maps 1 draft ids out.*16.*4 -> 16"),
    "d2t negative": (put("d2t", OFFSETS - [5, 0, 0, 0, 0]), "d2t maps 1 draft ids out.*0 -> -4"),
    "d2t repeats": (put("d2t", OFFSETS + (np.arange(5) == 0)), "several draft ids"),
    "t2d contradicts": (change("t2d", np.logical_not), "d2t and t2d contradict"),
    "t2d of integers": (change("t2d", lambda t: t.astype(np.int64)), "'t2d' is of dtype int64"),
    "t2d of another length": (change("t2d", lambda t: t[:15]), r"'t2d' has shape \(15,\).*\(16,\)"),
    "missing": (lambda a: a.pop("midlayer.hidden_norm.weight"), "'midlayer.hidden_norm.weight' is missing"),
    "extra": (put("fc2.bias", np.ones(8, np.float32)), "'fc2.bias' has no place"),
    "two layers": (lambda a: a.update(eagle3_arrays("layers.0")), "'layers.0.* has no place"),
    "transposed fc": (change("fc.weight", np.transpose), r"'fc.weight' has shape \(24, 8\).*\(8, 24\)"),
    "fc of one layer": (change("fc.weight", lambda w: w[:, :8]), r"'fc.weight' has shape \(8, 8\).*\(8, 24\)"),
    "lm_head of the target": (change("lm_head.weight", lambda w: np.resize(w, (16, 8))), r"shape \(16, 8\).*\(5, 8\)"),
    "NaN": (fill("fc.weight", np.nan), "'fc.weight' holds NaN"),
    "no layer": (lambda a: [a.pop(n) for n in list(a) if "midlayer" in n], "not a draft"),
}
EAGLE1_DAMAGE = {
    "no bias": (lambda a: a.pop("fc.bias"), "'fc.bias' is missing"),
    "input norm": (put("layers.0.input_layernorm.weight", np.ones(8, np.float32)), "input_layernorm.* has no place"),
    "d2t negative": (put("d2t", OFFSETS - [5, 0, 0, 0, 0]), "d2t maps 1 draft ids out.*0 -> -4"),
    "qkv bias": (put("layers.0.self_attn.q_proj.bias", np.ones(12, np.float32)), "q_proj.bias' has no place"),
}
HEAD_DAMAGE = [(eagle3_arrays, *case) for case in EAGLE3_DAMAGE.values()]
HEAD_DAMAGE += [(eagle1_arrays, *case) for case in EAGLE1_DAMAGE.values()]


@pytest.mark.parametrize(("build", "edit", "message"), HEAD_DAMAGE, ids=[*EAGLE3_DAMAGE, *EAGLE1_DAMAGE])
def test_damaged_heads(tmp_path: Path, build: Callable[[], Arrays], edit: Callable, message: str):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = build()
    read_all(target, write_bin(tmp_path / "intact", HEAD_CONFIG, arrays))
    edit(arrays)
    folder = write_bin(tmp_path / "damaged", HEAD_CONFIG, arrays)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        read_all(target, folder)


BLOCK0, BLOCK1 = (f"medusa_head.{i}.0.linear.weight" for i in range(2))
HEAD0, HEAD1 = (f"medusa_head.{i}.1.weight" for i in range(2))
MEDUSA_DAMAGE = {
    "no block": (lambda a: a.pop(BLOCK1), f"tensor '{BLOCK1}' is missing from medusa_lm_head.pt"),
    "no bias": (lambda a: a.pop("medusa_head.2.0.linear.bias"), "'medusa_head.2.0.linear.bias' is missing"),
    "no first lm_head": (lambda a: a.pop(HEAD0), f"'{HEAD0}' is missing"),
    "no head in the middle": (
        lambda a: [a.pop(n) for n in list(a) if n.startswith("medusa_head.1.")],
        "'medusa_head.1.0.linear.bias' .and 2 more. are missing",
    ),
    "heads of one and two blocks": (
        lambda a: a.update({n: a.pop(n.replace("2.2.", "2.1.")) for n in ["medusa_head.2.2.weight"]}),
        "'medusa_head.0.1.linear.bias' .and 7 more. are missing",
    ),
    "both namings": (put("2.0.linear.weight", np.ones((8, 8), np.float32)), "'2.0.linear.weight' has no place"),
    "extra": (put("medusa_head.0.0.norm.weight", np.ones(8, np.float32)), "'medusa_head.0.0.norm.weight' has no place"),
    "an lm_head of the target": (put("lm_head.weight", np.ones((16, 8), np.float32)), "'lm_head.weight' has no place"),
    "a whole model": (lambda a: a.update(llama_arrays()), "'lm_head.weight' has no place"),
    "wide block": (change(BLOCK0, lambda w: np.ones((8, 9), np.float32)), rf"'{BLOCK0}' has shape \(8, 9\).*\(8, 8\)"),
    "bias of another width": (change(BLOCK1.replace("weight", "bias"), lambda b: b[:7]), r"\(7,\), .*asks for \(8,\)"),
    "lm_head of another vocabulary": (change(HEAD1, lambda w: w[:15]), rf"'{HEAD1}' has shape \(15, 8\).*\(16, 8\)"),
    "transposed lm_head": (change(HEAD1, np.transpose), rf"'{HEAD1}' has shape \(8, 16\).*\(16, 8\)"),
    "flattened lm_head": (change(HEAD0, np.ravel), rf"'{HEAD0}': a Medusa head's lm_head.*\[V, H\].*\[128\]"),
    "empty lm_head": (change(HEAD0, lambda w: w[:0]), rf"'{HEAD0}': a Medusa head's lm_head.*\[0, 8\]"),
    "integers": (change(HEAD1, lambda w: w.astype(np.int32)), f"'{HEAD1}' is of dtype int32"),
    "NaN": (fill(BLOCK1, np.nan), f"'{BLOCK1}' holds NaN"),
}


@pytest.mark.parametrize("damage", MEDUSA_DAMAGE)
def test_damaged_medusa_heads(tmp_path: Path, damage: str):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = medusa_arrays()
    read_all(target, write_medusa(tmp_path / "intact", arrays))
    edit, message = MEDUSA_DAMAGE[damage]
    edit(arrays)
    folder = write_medusa(tmp_path / "damaged", arrays)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        read_all(target, folder)


@pytest.mark.parametrize("prefix", ["medusa_head.", ""])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_medusa_heads_are_counted(tmp_path: Path, prefix: str, blocks: int):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = medusa_arrays(5, blocks, prefix)
    for config in ({}, {"medusa_num_heads": 2}, {"medusa_num_heads": 7, "medusa_num_layers": blocks}):
        match = match_pair(target, write_medusa(tmp_path / "heads", arrays, config), None)[1]
        assert match is not None and match.kind == "medusa"
        assert match.model.config == MedusaConfig(vocab_size=16, hidden_size=8, num_heads=5, num_blocks=blocks)
        np.testing.assert_array_equal(match.read("heads.4.lm_head"), arrays[f"{prefix}4.{blocks}.weight"])
    folder = write_medusa(tmp_path / "contradicted", arrays, {"medusa_num_layers": blocks + 1})
    message = f"{folder / 'config.json'}: medusa_num_layers is {blocks + 1}.* a head has {blocks} residual"
    with pytest.raises(CheckpointError, match=message):
        match_pair(target, folder, None)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((17, 8), "vocab_size is 17 in the draft, 16 in the target"),
        ((16, 6), "hidden_size is 6 in the draft, 8 in the target"),
    ],
)
def test_medusa_heads_of_another_target(tmp_path: Path, shape: tuple[int, int], message: str):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    heads = write_medusa(tmp_path / "heads", {"0.0.weight": np.ones(shape, np.float32)}, {})
    with pytest.raises(ConfigError, match=message):
        match_pair(target, heads, None)


@pytest.mark.parametrize("damage", TARGET_DAMAGE)
def test_damaged_draft_models(tmp_path: Path, damage: str):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = llama_arrays()
    read_all(target, write_bin(tmp_path / "intact", CONFIG, arrays))
    edit, message = TARGET_DAMAGE[damage]
    edit(arrays)
    folder = write_bin(tmp_path / "damaged", CONFIG, arrays)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        read_all(target, folder)


def test_draft_model_of_another_vocabulary(tmp_path: Path):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    wide = llama_arrays() | {name: np.ones((17, 8), np.float32) for name in (EMBED, "lm_head.weight")}
    draft = write_safetensors(tmp_path / "draft", CONFIG | {"vocab_size": 17}, wide)
    with pytest.raises(ConfigError, match="vocab_size is 17 in the draft, 16 in the target"):
        match_pair(target, draft, None)


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize(
    ("arrays", "config", "message"),
    [
        (llama_arrays() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}, {}, None),
        (llama_arrays() | {"model.rotary_emb.inv_freq": np.ones(3, np.float16)}, {}, None),
        (llama_arrays() | {"lm_head.weight": llama_arrays()[EMBED]}, {"tie_word_embeddings": True}, None),
        (llama_arrays(), {"tie_word_embeddings": True}, "lm_head.weight.*differs from the embedding"),
        (llama_arrays() | {"lm_head.weight": np.ones((4, 8), np.float32)}, {"tie_word_embeddings": True}, "differs"),
        (llama_arrays(3), {"num_hidden_layers": 3}, None),
        (llama_arrays(), {"attention_bias": True}, "bias.* missing"),
    ],
)
def test_models_of_older_exporters(tmp_path: Path, role: str, arrays: Arrays, config: dict, message: str | None):
    folder = write_safetensors(tmp_path / "model", CONFIG | config, arrays)
    pair = folder, None
    if role == "draft":
        pair = write_safetensors(tmp_path / "target", CONFIG, llama_arrays()), folder
    if message is None:
        return read_all(*pair)
    with pytest.raises(CheckpointError, match=message):
        read_all(*pair)


def test_heads_of_newer_exporters(tmp_path: Path):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = eagle3_arrays("layers.0") | {"embed_tokens.weight": np.ones((16, 8), np.float32)}
    del arrays["t2d"]
    match = match_pair(target, write_safetensors(tmp_path / "head", HEAD_CONFIG, arrays), None)[1]
    assert match is not None and match.kind == "eagle3" and match.model.config.own_embedding
    np.testing.assert_array_equal(match.read("target_ids"), DRAFT_IDS)
    np.testing.assert_array_equal(match.read("embed"), arrays["embed_tokens.weight"])


def test_head_with_named_taps(tmp_path: Path):
    target = write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = eagle3_arrays() | {"fc.weight": np.ones((8, 16), np.float32)}
    config = HEAD_CONFIG | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}
    read_all(target, write_safetensors(tmp_path / "head", config, arrays))


@pytest.mark.parametrize("build", [eagle3_arrays, eagle1_arrays])
def test_draft_of_another_target(tmp_path: Path, build: Callable[[], Arrays]):
    head = write_bin(tmp_path / "head", HEAD_CONFIG, build())
    wide = llama_arrays() | {name: np.ones((17, 8), np.float32) for name in (EMBED, "lm_head.weight")}
    target = write_safetensors(tmp_path / "target", CONFIG | {"vocab_size": 17}, wide)
    with pytest.raises(ConfigError, match="vocab_size is 16 in the draft, 17 in the target"):
        match_pair(target, head, None)


@pytest.mark.parametrize("head", ["t1_eagle3_dv96", "t1_eagle3_dv256"])
def test_draft_of_another_width(golden: Path, tmp_path: Path, head: str):
    config = CONFIG | {"vocab_size": 256}
    wide = llama_arrays() | {name: np.ones((256, 8), np.float32) for name in (EMBED, "lm_head.weight")}
    target = write_safetensors(tmp_path, config, wide)
    with pytest.raises(ConfigError, match="hidden_size is 64 in the draft, 8 in the target"):
        match_pair(target, golden / "weights" / head, None)


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({}, None, "float32"),
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"torch_dtype": None, "dtype": "float16"}, None, "float16"),
        ({"torch_dtype": None}, None, "float16"),  # the tensors'
        ({"torch_dtype": "auto"}, None, "float16"),
        ({"torch_dtype": None, "inv_freq": True}, None, "float16"),  # whatever the tensors' that nobody reads
        ({}, "bfloat16", "bfloat16"),
        ({}, ml_dtypes.bfloat16, "bfloat16"),
    ],
)
def test_dtype_of_both_models(tmp_path: Path, config: dict, dtype: object, expected: str):
    halves = {name: array.astype(np.float16) for name, array in llama_arrays().items()}
    if config.get("inv_freq"):
        halves["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    target = write_safetensors(tmp_path / "target", CONFIG | config, halves)
    match, head = match_pair(target, write_bin(tmp_path / "head", HEAD_CONFIG, eagle3_arrays()), dtype)
    assert head is not None
    assert match.read("embed").dtype == head.read("fc").dtype == match.model.dtype == head.model.dtype == expected
    np.testing.assert_array_equal(head.read("fc"), eagle3_arrays()["fc.weight"].astype(expected))
    assert head.read("target_ids").dtype == np.int32


@pytest.mark.parametrize("dtype", ["float64", "int8", "half-ish"])
def test_refused_dtypes(tmp_path: Path, dtype: str):
    with pytest.raises(CheckpointError, match=f"dtype {dtype} is not one of"):
        match_pair(write_safetensors(tmp_path, CONFIG, llama_arrays()), None, dtype)


def test_refused_fields_of_a_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json: hidden_act"):
        match_pair(write_safetensors(tmp_path, CONFIG | {"hidden_act": "gelu"}, llama_arrays()), None, None)


def test_values_too_large_for_a_dtype(tmp_path: Path):
    arrays = llama_arrays()
    arrays[Q].flat[3] = 1e6
    folder = write_safetensors(tmp_path, CONFIG, arrays)
    read_all(folder, None, "bfloat16")
    with pytest.raises(CheckpointError, match=f"'{Q}' holds 1e.06, too large for float16"):
        read_all(folder, None, "float16")


def test_every_block_is_checked_and_cast(tmp_path: Path):
    values = np.linspace(-1, 1, 2 * BLOCK + 3, dtype=np.float32)
    tensor = Tensor("a", tmp_path, values.shape, "float32", lambda: values)
    np.testing.assert_array_equal(finite_values(tensor, ml_dtypes.bfloat16), values.astype(ml_dtypes.bfloat16))
    assert finite_values(tensor, np.dtype(np.float32)) is not None
    for at in (0, BLOCK, 2 * BLOCK + 2):
        damaged = values.copy()
        damaged[at] = np.nan
        with pytest.raises(CheckpointError, match="'a' holds NaN"):
            finite_values(Tensor("a", tmp_path, values.shape, "float32", lambda damaged=damaged: damaged), np.float32)
