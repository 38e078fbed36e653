"""Tensors that a head takes from its target, that two names share, or that nobody reads; every way in and out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import Eagle1Draft, Eagle3Draft, input_first, load_draft
from eagle_jax.convert import CheckpointError, convert, export, from_pretrained, load, to_official
from eagle_jax.convert.loading import load_head
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG, Arrays, assert_same, llama_arrays, read_arrays
from tests.convert.heads import eagle3, target

EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGE = CONFIG | {"num_hidden_layers": 8}  # whose default taps are three layers: every format takes them
ONE_VOCABULARY = CONFIG | {"num_hidden_layers": 1}
EAGLE1_CONFIG = ONE_VOCABULARY | {"bias": True}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def target_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    arrays = llama_arrays(8)
    if request.param:
        arrays.pop(LM_HEAD)
    return folders.write_safetensors(tmp_path / "target", LARGE | {"tie_word_embeddings": request.param}, arrays)


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in names}


def whole_vocabulary() -> Arrays:
    """An EAGLE-3 head without lm_head, and without tables."""
    return without(folders.eagle3_arrays(), LM_HEAD, "d2t", "t2d")


@pytest.mark.parametrize("kept", [EMBED, LM_HEAD])
def test_a_tied_model_may_keep_either_name(tmp_path: Path, kept: str):
    arrays, tied = llama_arrays(), CONFIG | {"tie_word_embeddings": True}
    value = arrays.pop(EMBED)
    arrays[LM_HEAD] = value
    both = folders.write_safetensors(tmp_path / "both", tied, arrays | {EMBED: value})
    one = folders.write_safetensors(tmp_path / "one", tied, without(arrays, LM_HEAD) | {kept: value})
    for draft in (None, one):
        models = from_pretrained(one, draft), load(convert(one, draft, tmp_path / f"out-{draft is None}"))
        for model in (model for pair in models for model in pair if model is not None):
            assert_same(to_official(model), to_official(from_pretrained(both)[0]))
    with pytest.raises(CheckpointError, match=f"'{EMBED}' is missing"):
        from_pretrained(folders.write_safetensors(tmp_path / "untied", CONFIG, arrays))


def test_a_head_without_lm_head_drafts_with_the_targets(target_folder: Path, tmp_path: Path):
    """Whatever its tables hold: those of one vocabulary are not read."""
    odd = {"d2t": np.arange(16)[::-1].copy(), "t2d": np.zeros(3, np.int8)}
    head = folders.write_safetensors(tmp_path / "head", ONE_VOCABULARY, whole_vocabulary() | odd)
    model, draft = from_pretrained(target_folder, head)
    assert isinstance(draft, Eagle3Draft) and draft.lm_head is None and draft.target_ids is None
    np.testing.assert_array_equal(draft.output_weight(model), model.output_weight())
    hidden = jnp.linspace(-1, 1, 16).reshape(2, 8)
    expected = np.asarray(draft.before_logits(hidden)) @ np.asarray(model.output_weight()).T
    for ours, theirs in ((draft, model), (input_first(draft), input_first(model))):
        np.testing.assert_allclose(ours.logits(theirs, hidden), expected, atol=1e-5)

    out = convert(target_folder, head, tmp_path / "out")
    for again in (load(out)[1], load_draft(out, model), load_draft(head, model), load_head(out)[1]):
        assert again is not None and again.config == draft.config
        assert_same(to_official(again), to_official(draft))


@pytest.mark.parametrize("format", ["official", "sglang", "vllm"])
def test_export_of_a_head_without_lm_head(target_folder: Path, tmp_path: Path, format: str):
    """The official code makes an lm_head of random numbers where the file has none."""
    arrays = to_official(eagle3(own_lm_head=False, draft_vocab_size=16))
    head = folders.write_safetensors(tmp_path / "head", ONE_VOCABULARY | {"head_dim": 4}, arrays)
    out = convert(target_folder, head, tmp_path / "converted")
    model = from_pretrained(target_folder)[0]
    for i, (own, draft) in enumerate(
        (load_head(out), load_head(target_folder, head), from_pretrained(target_folder, head))
    ):
        done = export(draft, own, tmp_path / str(i), format=format)
        written = read_arrays(tmp_path / str(i))
        assert (
            (LM_HEAD in written) == (format == "official") == any("lm_head.weight was added" in n for n in done.notes)
        )
        again = load_draft(tmp_path / str(i), model)
        np.testing.assert_array_equal(again.output_weight(model), model.output_weight())
        vocabulary = json.loads((tmp_path / str(i) / "config.json").read_text())["draft_vocab_size"]
        assert vocabulary == (None if format == "sglang" else 16)


def test_a_copy_of_an_lm_head_whose_logits_are_capped_is_refused(tmp_path: Path):
    capped = target()
    capped.config = dataclasses.replace(capped.config, logit_softcap=30.0)
    draft = eagle3(own_lm_head=False, draft_vocab_size=16)
    with pytest.raises(ConfigError, match=r"the target caps its logits.*formats that can hold it: .*sglang"):
        export(draft, capped, tmp_path / "out", format="official")


def test_an_abstract_target_has_no_lm_head_to_export(tmp_path: Path):
    draft = eagle3(own_lm_head=False, draft_vocab_size=16)
    with pytest.raises(ConfigError, match="load the target with its weights"):
        export(draft, target(), tmp_path / "out", format="official")
    assert list(tmp_path.iterdir()) == []
    export(draft, target(), tmp_path / "out", format="vllm")


def test_heads_that_need_an_lm_head(tmp_path: Path):
    model = folders.write_safetensors(tmp_path / "target", LARGE, llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", HEAD_CONFIG, without(folders.eagle3_arrays(), LM_HEAD))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing"):  # of another vocabulary
        from_pretrained(model, head)
    with pytest.raises(
        ConfigError, match=r"hidden_size .the draft has no lm_head of its own. is 8 .*, 12 in the target"
    ):
        narrow = eagle3(own_lm_head=False, own_embedding=True, draft_vocab_size=16, target_hidden_size=12)
        narrow.check_fits(target(hidden=12))


def test_a_head_tied_to_its_own_embedding(target_folder: Path, tmp_path: Path):
    own = folders.normal(np.random.default_rng(5), (16, 8))
    config = ONE_VOCABULARY | {"tie_word_embeddings": True}
    head = folders.write_safetensors(tmp_path / "head", config, whole_vocabulary() | {"embed_tokens.weight": own})
    for draft in (from_pretrained(target_folder, head)[1], load(convert(target_folder, head, tmp_path / "out"))[1]):
        np.testing.assert_array_equal(draft.lm_head, own)
        np.testing.assert_array_equal(draft.embed, own)


# EAGLE-1 and EAGLE-3 heads under the names of vLLM and NeMo: {name there: the official one}.
PREFIXED = {
    "vLLM": lambda name: name if name.startswith(("fc.", "lm_head.")) else f"model.{name}",
    "vLLM, older": lambda name: name if name.startswith(("fc.", "lm_head.")) else f"model.model.{name}",
    "official": lambda name: name,
    "NeMo": lambda name: name if name in (LM_HEAD, "d2t", "t2d") else f"model.{name}",
}


@pytest.mark.parametrize("naming", PREFIXED)
@pytest.mark.parametrize("nested", [False, True])
def test_heads_under_the_names_of_other_engines(tmp_path: Path, naming: str, nested: bool):
    model = folders.write_safetensors(tmp_path / "target", LARGE, llama_arrays(8))
    for config, arrays in ((EAGLE1_CONFIG, folders.eagle1_arrays()), (HEAD_CONFIG, folders.eagle3_arrays("layers.0"))):
        if nested:
            config = {"model_type": "eagle", "architectures": ["EAGLEModel"], "model": config}
        named = {PREFIXED[naming](name): array for name, array in arrays.items()}
        head = folders.write_safetensors(tmp_path / "head", config, named)
        out = convert(model, head, tmp_path / f"out-{len(arrays)}")
        for draft in (from_pretrained(model, head)[1], load(out)[1]):
            official = {name.replace("midlayer.", "layers.0."): array for name, array in to_official(draft).items()}
            assert_same(official, arrays)


@pytest.mark.parametrize("stated", [None, True])
@pytest.mark.parametrize("bias", [False, True])
def test_vllms_form_of_an_eagle1_head(tmp_path: Path, bias: bool, stated: bool | None):
    """It holds a copy of the target's lm_head, and weights that vLLM skips; whether fc has a bias its file tells."""
    model = folders.write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = folders.eagle1_arrays() if bias else without(folders.eagle1_arrays(), "fc.bias")
    unread = {
        "model.layers.0.input_layernorm.weight": np.ones(8, np.float32),
        "model.norm.weight": np.ones(8, np.float32),
        LM_HEAD: llama_arrays()[LM_HEAD],
    }
    nested = ONE_VOCABULARY | ({} if stated is None else {"eagle_fc_bias": bias})
    config = {"model_type": "eagle", "model": nested, "truncated_vocab_size": 16}
    head = folders.write_safetensors(tmp_path / "head", config, arrays | unread)
    for draft in (from_pretrained(model, head)[1], load(convert(model, head, tmp_path / "out"))[1]):
        assert isinstance(draft, Eagle1Draft) and draft.config.fc_bias == bias
        assert_same(to_official(draft), arrays)


def test_a_copied_lm_head_must_be_the_targets(target_folder: Path, tmp_path: Path):
    rows = read_arrays(target_folder)
    copy = rows.get(LM_HEAD, rows[EMBED])
    arrays = folders.eagle1_arrays()
    model = from_pretrained(target_folder)[0]
    head = folders.write_safetensors(tmp_path / "head", EAGLE1_CONFIG, arrays | {LM_HEAD: copy})
    for draft in (from_pretrained(target_folder, head)[1], load_draft(head, input_first(model))):
        assert_same(to_official(draft), arrays)
    for other in (copy + 1, copy[:, :6].copy()):
        folders.write_safetensors(head, EAGLE1_CONFIG, arrays | {LM_HEAD: other})
        for read in (lambda: from_pretrained(target_folder, head), lambda: load_draft(head, model)):
            with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from the target's lm_head"):
                read()


def test_two_tensors_for_one_place(tmp_path: Path):
    model = folders.write_safetensors(tmp_path / "target", CONFIG, llama_arrays())
    arrays = folders.eagle1_arrays()
    twice = arrays | {"model.embed_tokens.weight": arrays["embed_tokens.weight"]}
    head = folders.write_safetensors(tmp_path / "head", EAGLE1_CONFIG, twice)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight' and '.*embed_tokens.weight' stand for the same"):
        from_pretrained(model, head)
