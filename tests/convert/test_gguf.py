"""GGUF files: what they hold is what a Hugging Face folder of the same model holds; everything else is refused."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from eagle_jax.convert import CheckpointError, convert, from_pretrained, load, to_official
from eagle_jax.convert.gguf.config import llama3_scaling
from eagle_jax.convert.read import folder_of, open_checkpoint
from eagle_jax.models.config import RopeConfig
from eagle_jax.models.fields import ConfigError
from tests.convert import folders, gguf_files
from tests.convert.folders import assert_same
from tests.convert.gguf_files import KEYS, WIDE, of_official, wide_arrays


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return gguf_files.model(tmp_path / "model.gguf")


def test_a_file_holds_what_the_folder_it_was_made_from_holds(file: Path, tmp_path: Path):
    notes: list[str] = []
    for _ in range(2):
        convert(file, None, tmp_path / "out", note=notes.append)
    assert notes == [f"{(tmp_path / 'out').resolve()} holds this conversion already, nothing was written"]
    target, draft = load(tmp_path / "out")
    assert draft is None
    assert_same(to_official(target), folders.llama_arrays())
    config = target.config
    assert (config.head_dim, config.num_kv_heads, config.max_position_embeddings) == (6, 1, 64)
    assert (config.rope, config.rms_norm_eps, config.tie_word_embeddings) == (RopeConfig(theta=500.0), 1e-5, False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["target"]["files"]) == ["model.gguf"] and manifest["dtype"] == "float32"


def test_a_folder_with_one_file_is_that_file_and_a_model_may_be_a_draft(file: Path):
    target, draft = from_pretrained(file.parent, file)
    assert_same(to_official(target), to_official(draft))


def test_a_command_takes_a_file_as_it_is(file: Path, tmp_path: Path):
    folder = folder_of(file)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 8
    gguf_files.model(file, {"llama.rope.freq_base": 900.0})
    assert json.loads((folder_of(file) / "config.json").read_text())["rope_theta"] == 900.0, "the file was changed"


def test_an_output_folder_that_contains_the_file_is_refused(file: Path):
    with pytest.raises(CheckpointError, match="is or contains the source"):
        convert(file, None, file.parent, overwrite=True)


BIAS = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 32, "ffn_gate": 64, "ffn_up": 64, "ffn_down": 32}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_matrices_are_dequantised_and_the_order_of_rows_undone(kind: str, tmp_path: Path):
    kind, arrays = gguf.GGMLQuantizationType[kind], wide_arrays()
    kinds = {name: kind for name, array in arrays.items() if array.ndim == 2}
    rng = np.random.default_rng(6)
    arrays |= {f"blk.{i}.{name}.bias": folders.normal(rng, (n,)) for i in range(2) for name, n in BIAS.items()}
    path = gguf_files.write(tmp_path / "model.gguf", arrays, KEYS | WIDE, kinds)
    target, _ = from_pretrained(path)
    assert str(target.dtype) == {"F16": "float16", "BF16": "bfloat16"}.get(kind.name, "float32")
    assert target.config.tie_word_embeddings and target.config.attention_bias and target.config.mlp_bias
    read = {name: gguf.dequantize(gguf.quantize(arrays[name], kind), kind) for name in kinds}
    found = to_official(target)
    for official, name in gguf_files.NAMES.items():
        expected = read.get(name, arrays.get(name))
        if expected is None:  # the tied lm_head
            continue
        heads = 4 if ".q_proj." in official else 2 if ".k_proj." in official else 0
        actual = gguf_files.interleaved(found[official], heads) if heads else found[official]
        np.testing.assert_array_equal(actual, expected.astype(target.dtype), err_msg=name)


def dequantised() -> list[str]:
    """The types of blocks that the package gguf dequantises."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return found


@pytest.mark.parametrize("kind", dequantised())
def test_every_type_that_gguf_dequantises_is_read(kind: str, tmp_path: Path):
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    values = np.random.default_rng(7).integers(0, 60, (3, 2 * size)).astype(np.uint8)  # as float16, small and finite
    writer = gguf.GGUFWriter(path := tmp_path / "model.gguf", "llama")
    for key, value in KEYS.items():
        gguf_files._add(writer, key, value)
    writer.add_tensor("some.weight", values, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_checkpoint(path).tensors["some.weight"]
    assert tensor.shape == (3, 2 * block)
    np.testing.assert_array_equal(tensor.load(), gguf.dequantize(values, quantisation))


def llama3_divisors(frequencies: np.ndarray, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """What llama.cpp's converter writes, in float32."""
    found = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            found.append(1.0)
        else:
            found.append(factor if wavelength > length / low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama3_scaling_is_found_from_the_divisors_of_its_frequencies(factor: float, length: int):
    frequencies = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    settings = llama3_scaling(llama3_divisors(frequencies, factor, 1.0, 4.0, length), 128, 500000.0, "here")
    assert settings == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }
    assert llama3_scaling(np.ones(64, np.float32), 128, 500000.0, "here") == {}
    for wrong in (np.linspace(1, 8, 64), np.full(64, 2.0), np.ones(63), np.full(64, np.nan)):
        with pytest.raises(ConfigError, match=r"rope_freqs.weight are not those of Llama 3"):
            llama3_scaling(wrong.astype(np.float32), 128, 500000.0, "here")


def test_divisors_in_a_file_become_its_scaling(tmp_path: Path):
    keys = KEYS | {"llama.rope.freq_base": 500000.0} | {f"llama.attention.{n}_length": 64 for n in ("key", "value")}
    frequencies = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    divisors = llama3_divisors(frequencies, 8.0, 1.0, 4.0, 8192)
    path = gguf_files.write(
        tmp_path / "model.gguf", {"rope_freqs.weight": divisors}, keys | {"llama.rope.dimension_count": 64}
    )
    config = open_checkpoint(path).config
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 8.0


def changed(**keys: Any) -> Callable[[Path], Path]:
    dotted = {key.replace("__", "."): value for key, value in keys.items()}
    return lambda folder: gguf_files.model(folder / "model.gguf", dotted)


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        arrays = of_official(folders.llama_arrays())
        change(arrays)
        return gguf_files.model(folder / "model.gguf", arrays=arrays)

    return written


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        path = gguf_files.model(folder / "model.gguf")
        path.write_bytes(change(path.read_bytes()))
        return path

    return written


def several(folder: Path) -> Path:
    gguf_files.model(folder / "a.gguf")
    return gguf_files.model(folder / "b.gguf").parent


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "several files": (several, r"several GGUF files \(a.gguf, b.gguf\); name one of them"),
    "an empty file": (damaged(lambda data: b""), "the file is empty or damaged"),
    "another format": (damaged(lambda data: b"ggml" + data[4:]), "is no GGUF file"),
    "an old version": (damaged(lambda data: data[:4] + struct.pack("<I", 1) + data[8:]), "GGUF file of version 1"),
    "big-endian": (damaged(lambda data: data[:4] + struct.pack(">I", 3) + data[8:]), "is a big-endian GGUF file"),
    "cut off in the header": (damaged(lambda data: data[:200]), "the header is cut off; the file is damaged"),
    "cut off in a tensor": (damaged(lambda data: data[:-32]), r"ends at byte \d+ of \d+; the file is incomplete"),
    "a false count": (damaged(lambda data: data[:16] + b"\xff" * 8 + data[24:]), "the file is damaged"),
    "a part": (changed(split__count=3), "one of 3 parts of a model; join them"),
    "another architecture": (
        changed(general__architecture="qwen2"),
        "architecture 'qwen2'; of GGUF files",
    ),
    "experts": (changed(llama__expert_count=8), r"llama.expert_count = 8 is not implemented"),
    "an unknown key": (changed(llama__new_mathematics=1), "the key llama.new_mathematics is not known"),
    "part of a head rotated": (
        changed(llama__rope__dimension_count=4),
        "dimension_count = 4 of a head of 6",
    ),
    "yarn": (changed(llama__rope__scaling__type="yarn"), "rope type 'yarn' of a GGUF file is not implemented"),
    "layers that differ": (changed(llama__attention__head_count=[2, 1]), "differs from layer to layer"),
    "values of another length": (changed(llama__attention__value_length=4), "value_length differ"),
    "no size": (changed(llama__embedding_length=None), "has no llama.embedding_length"),
    "a size that is none": (changed(llama__embedding_length="x"), "hidden_size"),
    "a false alignment": (changed(general__alignment=3), "general.alignment is 3"),
    "a missing tensor": (tensors(lambda arrays: arrays.pop("blk.1.ffn_up.weight")), "'blk.1.ffn_up.weight' is missing"),
    "a tensor too many": (
        tensors(lambda arrays: arrays.update({"blk.0.attn_q_norm.weight": np.ones(6, np.float32)})),
        "'blk.0.attn_q_norm.weight' has no place in the model that its metadata describes",
    ),
    "another shape": (
        tensors(lambda arrays: arrays.update({"blk.0.ffn_up.weight": np.ones((8, 12), np.float32)})),
        r"has shape \(8, 12\), its metadata asks for \(12, 8\)",
    ),
    "rows of no heads": (
        tensors(lambda arrays: arrays.update({"blk.0.attn_q.weight": np.ones((13, 8), np.float32)})),
        "does not divide into 2 heads",
    ),
    "NaN": (tensors(lambda arrays: arrays["output.weight"].fill(np.nan)), "'output.weight' holds NaN"),
    "a vocabulary of another kind": (changed(tokenizer__ggml__model="t5"), "of kind 't5'; 'gpt2' and 'llama' are read"),
    "a vocabulary without tokens": (changed(tokenizer__ggml__model="gpt2"), "no list tokenizer.ggml.tokens"),
    "a cut that is not known": (
        changed(tokenizer__ggml__model="gpt2", tokenizer__ggml__tokens=["a"], tokenizer__ggml__pre="viking"),
        "tokenizer.ggml.pre is 'viking'",
    ),
    "a merge of no token": (
        changed(
            tokenizer__ggml__model="gpt2",
            tokenizer__ggml__tokens=["a"],
            tokenizer__ggml__pre="gpt-2",
            tokenizer__ggml__merges=["b c"],
        ),
        "its vocabulary is damaged",
    ),
    "a template outside the folder": (
        changed(
            **{"tokenizer__chat_template__../x": "hi", "tokenizer__ggml__model": "gpt2"},
            tokenizer__ggml__tokens=["a"],
            tokenizer__ggml__pre="gpt-2",
            tokenizer__ggml__merges=[""],
        ),
        "refused|damaged",
    ),
}


@pytest.mark.parametrize(("written", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_name(written: Callable[[Path], Path], message: str, tmp_path: Path):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert(written(tmp_path / "in"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_type_that_gguf_does_not_know_and_its_absence_are_said(tmp_path: Path, monkeypatch):
    kinds = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0}
    path = gguf_files.write(tmp_path / "model.gguf", wide_arrays(), KEYS | WIDE, kinds)
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16  # after the rank and two dimensions
    for type, message in ((9, "type Q8_1, which the package gguf does not dequantise"), (999, "type 999, which")):
        path.write_bytes(data[:at] + struct.pack("<I", type) + data[at + 4 :])
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(path)
    path.write_bytes(data)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'eagle-jax\[gguf\]'"):
        from_pretrained(path)


def test_damaged_headers_are_errors_of_ours(file: Path):
    """Any other exception fails, as does a hang or an allocation by a false length."""
    data, rng = file.read_bytes(), np.random.default_rng(8)
    end = data.rindex(b"output.weight") + 64
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        for at in rng.integers(4, end, rng.integers(1, 4)):
            broken[at] = rng.integers(256)
        file.write_bytes(bytes(broken))
        try:
            open_checkpoint(file)
        except (CheckpointError, ConfigError):
            refused += 1
    assert 100 < refused < 400
