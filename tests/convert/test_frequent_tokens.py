"""FR-Spec: EAGLE-1 heads that draft frequent tokens only, from every source of their table, and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eagle_jax import Eagle1Draft, input_first
from eagle_jax.cli import main
from eagle_jax.convert import HeadChoices, convert, export, from_pretrained, load, to_official
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.loading import load_draft, load_head
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG, assert_same, read_arrays
from tests.convert.heads import eagle1, target
from tests.convert.reading import EAGLE1_CONFIG

IDS = np.array([7, 2, 15, 0, 9])  # by frequency, not ascending
LM_HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write_safetensors(tmp_path_factory.mktemp("target"), CONFIG, folders.llama_arrays())


def head(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    return folders.write_safetensors(folder / "head", EAGLE1_CONFIG | fields, folders.eagle1_arrays() | tensors)


def cpmcu(folder: Path) -> tuple[Path, HeadChoices]:
    return head(folder, {}, {"token_id_remap": IDS.astype(np.int32)}), HeadChoices()


def vllm(folder: Path) -> tuple[Path, HeadChoices]:
    """It may hold a copy of the target's rows."""
    config = {"model_type": "eagle", "model": EAGLE1_CONFIG, "truncated_vocab_size": 5}
    arrays = folders.eagle1_arrays() | {"token_map": IDS, LM_HEAD: folders.llama_arrays()[LM_HEAD][IDS]}
    return folders.write_safetensors(folder / "head", config, arrays), HeadChoices()


def by_pytorch(folder: Path) -> tuple[Path, HeadChoices]:
    torch.save(IDS.tolist(), folder / "freq_5.pt")
    return head(folder, {}, {}), HeadChoices(token_map=str(folder / "freq_5.pt"))


def by_tensor(folder: Path) -> tuple[Path, HeadChoices]:
    """In place of a table in the file."""
    torch.save(torch.tensor(IDS), folder / "freq_5.pt")
    return head(folder, {}, {"model.token_id_remap": np.arange(3)}), HeadChoices(token_map=str(folder / "freq_5.pt"))


def by_json(folder: Path) -> tuple[Path, HeadChoices]:
    (folder / "freq.json").write_text(json.dumps(IDS.tolist()))
    return head(folder, {"draft_vocab_size": 5}, {}), HeadChoices(token_map=str(folder / "freq.json"))


@pytest.mark.parametrize("source", [cpmcu, vllm, by_pytorch, by_tensor, by_json])
def test_one_head_from_every_source_of_its_table(source: Any, model: Path, tmp_path: Path):
    folder, choices = source(tmp_path)
    loaded, draft = from_pretrained(model, folder, head=choices)
    rows = folders.llama_arrays()[LM_HEAD][IDS]
    others = [load_draft(folder, input_first(loaded), head=choices)]
    others.append(load(convert(model, folder, tmp_path / "out", head=choices))[1])
    for one in (draft, *others):
        assert isinstance(one, Eagle1Draft) and one.config.draft_vocab_size == 5
        assert np.asarray(one.target_ids[...]).tolist() == IDS.tolist()
        np.testing.assert_array_equal(one.lm_head[...], rows)
    official = to_official(draft)
    assert (official.pop("d2t") + np.arange(5)).tolist() == IDS.tolist()
    assert np.flatnonzero(official.pop("t2d")).tolist() == sorted(IDS)
    assert_same(official, folders.eagle1_arrays())  # the rows are the target's


def test_its_logits_are_the_targets_rows(model: Path, tmp_path: Path):
    """In a cap, too."""
    loaded, draft = from_pretrained(model, cpmcu(tmp_path)[0])
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 8))
    for cap in (None, 1.5):
        loaded.config = loaded.config.__class__(**loaded.config.__dict__ | {"logit_softcap": cap})
        np.testing.assert_allclose(draft.logits(loaded, hidden), loaded.logits(hidden)[..., IDS], rtol=1e-6, atol=1e-6)


def test_another_table_is_another_conversion(model: Path, tmp_path: Path):
    folder, choices = by_json(tmp_path)
    out, said = tmp_path / "out", []
    options = ["--target", str(model), "--draft", str(folder), "--out", str(out), "--token-map", choices.token_map]
    assert main(["convert", *options]) == 0
    convert(model, folder, out, head=choices, note=said.append)
    assert "holds this conversion already" in said[0]
    (tmp_path / "freq.json").write_text(json.dumps(IDS[::-1].tolist()))
    with pytest.raises(CheckpointError, match="holds another conversion"):
        convert(model, folder, out, head=choices)


@pytest.mark.parametrize("written", ["[[1, 2]]", "[]", "[1.5]", '{"1": 2}', "[", "[true]", '["a"]'])
def test_a_file_that_is_no_list_of_ids(written: str, model: Path, tmp_path: Path):
    folder, choices = by_json(tmp_path)
    (tmp_path / "freq.json").write_text(written)
    with pytest.raises(CheckpointError, match=r"freq.json: is no list of token ids"):
        from_pretrained(model, folder, head=choices)


def test_a_size_without_a_table_means_all_tokens(model: Path, tmp_path: Path):
    """CPM.cu's heads state the size of a table that their file need not have."""
    folder = head(tmp_path, {"draft_vocab_size": 5}, {})
    draft = from_pretrained(model, folder)[1]
    assert draft.target_ids is None and draft.config.draft_vocab_size == 16
    entry = json.loads((convert(model, folder, tmp_path / "out") / "manifest.json").read_text())["draft"]
    assert "all tokens, as no table" in entry["reading"]["reasons"]["draft_vocab_size"]


def test_what_takes_no_table(model: Path, tmp_path: Path):
    _, choices = by_json(tmp_path)
    eagle3 = folders.write_safetensors(tmp_path / "eagle3", HEAD_CONFIG, folders.eagle3_arrays())
    with pytest.raises(ConfigError, match="is no EAGLE-1 head; only those take a token_map"):
        from_pretrained(model, eagle3, head=choices)
    missing = HeadChoices(token_map=str(tmp_path / "none.json"))
    with pytest.raises(CheckpointError, match=r"none.json: cannot be read \(No such file"):
        from_pretrained(model, head(tmp_path, {}, {}), head=missing)


def test_the_way_out(tmp_path: Path):
    draft = eagle1(draft_vocab_size=5, input_norms=True, fc_bias=True)
    draft.target_ids[...] = jnp.asarray(IDS, jnp.int32)
    done = export(draft, target(), tmp_path / "out", format="cpmcu")  # reads back and compares
    arrays, config = read_arrays(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert arrays["token_id_remap"].tolist() == IDS.tolist() and arrays["token_id_remap"].dtype == np.int32
    assert config["draft_vocab_size"] == 5 and not {"d2t", "t2d", LM_HEAD} & arrays.keys()
    assert any("frspec_vocab_size=5" in note for note in done.notes)
    hf = CONFIG | {"head_dim": 4, "num_hidden_layers": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
    its_target = target(layers=2, real=True)
    folder = folders.write_safetensors(tmp_path / "target", hf, to_official(its_target))
    again = load_head(folder, tmp_path / "out")[1]
    kept = {path: np.asarray(leaf) for path, leaf in params.flatten(draft).items() if path != "lm_head"}
    read = {path: np.asarray(leaf) for path, leaf in params.flatten(again).items()}
    np.testing.assert_array_equal(read.pop("lm_head"), np.asarray(its_target.lm_head[...])[IDS])
    assert_same(read, kept)
    for format in ("official", "sglang", "vllm", "nxd"):
        with pytest.raises(ConfigError, match="it drafts 5 of 16 tokens, its files have no table"):
            export(draft, target(), tmp_path / format, format=format)
