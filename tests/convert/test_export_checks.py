"""export: what an engine cannot run is refused before anything is written; other files are noticed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import Llama
from eagle_jax.convert import CheckpointError, export, exporting
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError, RopeConfig
from tests.convert.folders import assert_same, read_arrays
from tests.convert.heads import LLAMA3, eagle1, eagle3, target

FORMATS = ("official", "sglang", "vllm")


def refused(draft: Any, format: str, tmp_path: Path, its_target: Llama | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        export(draft, its_target or target(), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []
    return str(raised.value)


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (lambda: eagle3(taps=(1, 4, 7)), "official", r"taps layers \[1, 4, 7\], the engine always reads \[2, 4, 5\]"),
        (lambda: eagle3(taps=(0, 4, 7)), "sglang", r"taps layers \[0, 4, 7\], the engine reads the inputs of 1 to 7"),
        (lambda: eagle3(taps=(1, 4, 8)), "vllm", r"taps layers \[1, 4, 8\], the engine reads the inputs of 0 to 7"),
        (lambda: eagle3(taps=(4, 1, 7)), "vllm", r"\[4, 1, 7\], the engine reads each layer once and in order"),
        (lambda: eagle3(taps=(1, 1, 7)), "sglang", r"\[1, 1, 7\], the engine reads each layer once and in order"),
        (lambda: eagle3(num_taps=2, taps=(2, 5)), "vllm", "taps 2 layers, the engine reads 3"),
        (lambda: eagle3(num_taps=1, taps=(2,)), "sglang", r"features are as wide as the head \(8\)"),
        (
            lambda: eagle3(norm_before_residual=True),
            "sglang",
            "norm_before_residual is true.*hold it: vllm, speculators",
        ),
        (lambda: eagle3(norm_before_residual=True), "official", "norm_before_residual is true"),
        (lambda: eagle3(attention_bias=True), "sglang", "attention_bias is true.*can hold it: vllm, speculators"),
        (lambda: eagle3(mlp_bias=True), "official", "mlp_bias is true"),
        (lambda: eagle1(mlp_bias=True), "sglang", "mlp_bias is true"),
        (lambda: eagle3(head_dim=6), "official", "head_dim is 6, it takes hidden_size / heads only"),
        (
            lambda: eagle3(rope=LLAMA3),
            "official",
            "rope type 'llama3' is not read.*: sglang, vllm, speculators",
        ),
        (lambda: eagle3(rope=RopeConfig(10000.0, "dynamic", 4.0, original_length=64)), "vllm", "rope type 'dynamic'"),
        (lambda: eagle3(rope=RopeConfig(5e5, "linear", 4.0)), "official", "rope_theta is 500000, it takes 10000"),
        (
            lambda: eagle1(fc_bias=True),
            "vllm",
            r"fc.bias \(bias is true\) is not read.*can hold it: official, sglang, cpmcu, nxd\)",
        ),
        (lambda: eagle1(qkv_bias=True), "sglang", "qkv_bias is true"),
        (lambda: eagle3(own_embedding=True), "sglang", "embed_tokens is its own.*can hold it: official, vllm"),
        (lambda: eagle1(own_embedding=True), "vllm", r"embed_tokens is its own.*can hold it: official, nxd\)"),
        (lambda: eagle3(norm_before_residual=True, rope=LLAMA3), "official", "rope type .*; norm_before_residual"),
        (lambda: eagle1(fc_bias=True, qkv_bias=True, mlp_bias=True), "vllm", r"no other format can hold it either\)"),
    ],
)
def test_refusals_name_the_field(make: Any, format: str, message: str, tmp_path: Path):
    assert re.search(message, refused(make(), format, tmp_path))


@pytest.mark.parametrize("format", FORMATS)
def test_a_target_of_few_layers_has_no_three_taps(format: str, tmp_path: Path):
    assert "once and in order" in refused(eagle3(), format, tmp_path, target(layers=6))


def test_other_drafts_and_formats_are_refused(tmp_path: Path):
    medusa = params.abstract(lambda key: Medusa(MedusaConfig(16, 8, 2, 1), key))
    assert "a Medusa cannot be exported: the formats are for EAGLE heads" in refused(medusa, "vllm", tmp_path)
    assert "unknown format 'trt'; known: official, sglang, vllm, speculators" in refused(eagle3(), "trt", tmp_path)
    assert "does not fit the target" in refused(eagle3(), "vllm", tmp_path, target(hidden=12))


@pytest.mark.parametrize("make", [eagle3, eagle1])
def test_an_embedding_that_is_the_targets_may_be_replaced(make: Any, tmp_path: Path):
    its_target, draft = target(real=True), make(own_embedding=True)
    assert "embed_tokens is its own" in refused(draft, "sglang", tmp_path, its_target)
    same = params.load(draft, params.flatten(draft) | {"embed": params.flatten(its_target)["embed"]})
    assert "embed_tokens is its own" in refused(same, "sglang", tmp_path)  # unknown: the target is abstract
    export(same, its_target, tmp_path / "out", format="sglang")
    assert read_arrays(tmp_path / "out")["embed_tokens.weight"].tobytes() == np.asarray(its_target.embed).tobytes()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = exporting.write_tensors

    def damaged(path: Path, tensors: Any) -> None:
        write(path, tensors)
        flip(path, -4)  # the lowest byte of the last value: no header, no check finds it

    monkeypatch.setattr(exporting, "write_tensors", damaged)
    with pytest.raises(CheckpointError, match=r"reads back differently: tensor .*, parameter"):
        export(eagle1(), target(), tmp_path / "out", format="sglang")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, "tensor lm_head.weight"),
        (lambda tensors: tensors | {"d2t": tensors["d2t"] * 0}, "contradict"),
        (lambda tensors: {name: array for name, array in tensors.items() if name != "norm.weight"}, "norm.weight"),
        (lambda tensors: {name: a for name, a in tensors.items() if name != "t2d"}, "differently: tensor t2d"),
        (
            lambda tensors: (
                tensors
                | {
                    "midlayer.mlp.gate_proj.weight": tensors["midlayer.mlp.up_proj.weight"],
                    "midlayer.mlp.up_proj.weight": tensors["midlayer.mlp.gate_proj.weight"],
                }
            ),
            "parameter layer.mlp.gate, parameter layer.mlp.up",
        ),
    ],
)
def test_other_tensors_are_noticed(damage: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = exporting.write_tensors
    monkeypatch.setattr(exporting, "write_tensors", lambda path, tensors: write(path, damage(tensors)))
    with pytest.raises(CheckpointError, match=message):
        export(eagle3(), target(), tmp_path / "out", format="sglang")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_says_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make = exporting.plan

    def wrong(*args: Any) -> Any:
        planned = make(*args)
        return dataclasses.replace(planned, config=planned.config | {"rope_theta": 1.0})

    monkeypatch.setattr(exporting, "plan", wrong)
    with pytest.raises(CheckpointError, match=r"differently: config\.json: rope"):
        export(eagle3(), target(), tmp_path / "out", format="sglang")
    assert list(tmp_path.iterdir()) == []


def test_places(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    export(eagle3(), target(), out, format="vllm")  # an empty folder is free
    before = read_arrays(out)
    with pytest.raises(CheckpointError, match="is not empty; choose another output folder"):
        export(eagle1(), target(), out, format="vllm")
    assert_same(read_arrays(out), before)
    with pytest.raises(CheckpointError, match="is a file"):
        export(eagle1(), target(), out / "config.json", format="vllm")
    export(eagle1(), target(), out, format="vllm", overwrite=True)
    assert "norm.weight" not in read_arrays(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exported", [False, True])
def test_other_files_stay(tmp_path: Path, exported: bool):
    out = tmp_path / "out"
    if exported:
        export(eagle1(), target(), out, format="vllm")
    (out / "logs").mkdir(parents=True)
    for name in ("README.md", "logs/loss.csv"):
        (out / name).write_text("mine")
    done = export(eagle3(), target(), out, format="official", overwrite=True)
    assert done.notes[-1] == f"kept in {out}: README.md, logs"
    assert {path.name for path in out.iterdir()} == {"README.md", "logs", "config.json", "pytorch_model.bin"}
    assert (out / "logs" / "loss.csv").read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    (out / "model-00001-of-00002.safetensors").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"holds other weights .model-00001-of-00002.safetensors., which an engine"
    ):
        export(eagle3(), target(), out, format="vllm", overwrite=True)


def test_weights_that_are_not_finite(tmp_path: Path):
    draft = eagle3()
    nan = params.load(draft, params.flatten(draft) | {"norm": jnp.full((8,), jnp.nan)})
    with pytest.raises(CheckpointError, match=r"'norm\.weight' holds NaN"):
        export(nan, target(), tmp_path / "out", format="vllm")
    large = params.load(draft, params.flatten(draft) | {"norm": jnp.full((8,), 1e6)})
    with pytest.raises(CheckpointError, match="too large for float16"):
        export(large, target(), tmp_path / "out", format="vllm", dtype="float16")
    assert list(tmp_path.iterdir()) == []
