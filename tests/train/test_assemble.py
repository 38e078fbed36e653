"""What a run starts with: hub ids with a revision, and data of token ids for a target without a tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eagle_jax import Eagle3Draft, Llama, convert
from eagle_jax.models.architectures import config_of
from eagle_jax.models.layers import normed
from eagle_jax.train.config import DataSettings, TrainSettings
from eagle_jax.train.run import assemble, evaluate
from eagle_jax.tree.named import tree_named
from tests.convert.heads import dflash, eagle1
from tests.toy import random_eagle3
from tests.train.models import CONFIG


@pytest.fixture
def folder(tmp_path):
    """A target without weights and without a tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def settings_of(**values) -> TrainSettings:
    return TrainSettings(**dict(kind="eagle3", output="out", data={"train": ["data.jsonl"]}, steps=1) | values)


def test_a_hub_id_may_name_a_revision(folder, monkeypatch):
    asked = []

    def found(model):
        return lambda source, *args, revision, **options: asked.append((source, revision)) or model

    monkeypatch.setattr(assemble, "folder_of", lambda source, hub: asked.append((source, hub.revision)) or folder)
    head = settings_of(target="owner/target@v1", start="owner/head@v2")
    origin = assemble.source(head)
    monkeypatch.setattr(convert, "load_draft", found(random_eagle3(0)))
    monkeypatch.setattr(convert, "from_pretrained", found((SimpleNamespace(config=origin.config), None)))
    target = assemble.load_target(head, None)
    assemble.new_model(head, origin, target, None, print)
    whole = settings_of(kind="target", model=str(folder / "config.json"), start="owner/whole")
    assemble.new_model(whole, origin, None, None, print)
    assert asked == [("owner/target", "v1"), ("owner/target", "v1"), ("owner/head", "v2"), ("owner/whole", None)]


def test_no_run_starts_from_a_head_of_frequent_tokens(folder, monkeypatch):
    settings = settings_of(kind="eagle1", target=str(folder), start="head")
    monkeypatch.setattr(convert, "load_draft", lambda *_, **options: eagle1(draft_vocab_size=5))
    with pytest.raises(ValueError, match=r"start: head drafts frequent tokens only, .*--token-map"):
        assemble.new_model(settings, assemble.source(settings), SimpleNamespace(), None, print)


def test_no_run_starts_from_blocks_that_training_does_not_know(folder, monkeypatch):
    settings = settings_of(kind="dflash", target=str(folder), start="head", head={"mask_token_id": 1})
    for part in ({"from_root": True}, {"own_lm_head": True}):
        monkeypatch.setattr(convert, "load_draft", lambda *_, part=part, **options: dflash(**part))
        with pytest.raises(ValueError, match=r"start: head has an lm_head of its own, or drafts a token at the root"):
            assemble.new_model(settings, assemble.source(settings), SimpleNamespace(), None, print)


def test_the_settings_of_a_head_are_its_config(folder):
    origin = assemble.source(settings_of(target=str(folder)))
    head = {"num_layers": 2, "windows": [8, None], "qk_norm": True, "norm_before_residual": True, "taps": [0, 1]}
    head |= {"fc_norm": True, "norm_output": True, "draft_vocab_size": 9}
    config = assemble.head_config(settings_of(target=str(folder), head=head), origin.config)
    assert {name: getattr(config, name) for name in head} == head | {"windows": (8, None), "taps": (0, 1)}
    plain = assemble.head_config(settings_of(target=str(folder)), origin.config)
    assert (plain.num_layers, plain.windows, plain.norm_output) == (1, (), False)


def test_the_settings_of_a_dflash_head_are_its_config(folder):
    head = {"num_layers": 2, "windows": [8, None], "mask_token_id": 9, "block_size": 6, "causal": True}
    settings = settings_of(kind="dflash", target=str(folder), head=head)
    assert settings.evaluation.tree == "best:5,16"
    assert settings_of(**settings.model_dump() | {"evaluation": {"tree": "chain:3"}}).evaluation.tree == "chain:3"
    target = assemble.source(settings).config
    config = assemble.head_config(settings, target)
    assert {name: getattr(config, name) for name in head} == head | {"windows": (8, None)}
    assert (config.taps, config.num_target_layers, config.qk_norm) == ((2,), 3, True)
    tapped = settings_of(kind="dflash", target=str(folder), head=head | {"taps": [1, 3]})
    assert assemble.head_config(tapped, target).taps == (1, 3)
    for wrong, message in (
        ({"mask_token_id": CONFIG["vocab_size"]}, "head.mask_token_id 352 is no token of the target's"),
        ({"taps": [0, 1]}, r"head.taps \[0, 1\]: a DFlash head reads the inputs of layers 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble.head_config(settings_of(kind="dflash", target=str(folder), head=head | wrong), target)
    deep = assemble.new_dflash(config, jax.random.key(0), Llama(target, jax.random.key(1)), None, print)
    evaluate.check_depth(deep, tree_named("chain:5"), "chain:5")
    with pytest.raises(ValueError, match=r"evaluation\.tree chain:6 is 6 deep, and this head drafts 5 tokens at most"):
        evaluate.check_depth(deep, tree_named("chain:6"), "chain:6")


def test_the_settings_of_a_p_eagle_head_are_its_config_and_its_loss(folder):
    head = {"num_layers": 2, "windows": [8, None], "qk_norm": True, "fc_norm": True, "taps": [0, 1]}
    head |= {"draft_vocab_size": 9, "mask_token_id": 9, "num_depths": 5}
    loss = {"retention": 0.5, "least_retention": 0.25, "position_decay": 3.0, "objective": "lk"}
    settings = settings_of(kind="peagle", target=str(folder), head=head, loss=loss)
    assert settings.evaluation.tree == "best:5,16"
    config = assemble.head_config(settings, assemble.source(settings).config)
    assert {name: getattr(config, name) for name in head} == head | {"windows": (8, None), "taps": (0, 1)}
    objective = assemble.objective_of(settings)
    assert {name: getattr(objective, name) for name in loss if name != "objective"} | {
        "objective": objective.token_loss
    } == loss
    large = settings_of(kind="peagle", target=str(folder), head=head | {"mask_token_id": CONFIG["vocab_size"]})
    with pytest.raises(ValueError, match=r"head.mask_token_id 352 is no token of the target's"):
        assemble.head_config(large, assemble.source(settings).config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head": {"windows": [8]}, "kind": "eagle1"},
            "head.windows is for kind eagle3 or peagle or dflash, not eagle1",
        ),
        ({"head": {"num_layers": 2, "windows": [8]}}, "windows has 1 entries for 2 layers"),
        ({"head": {"fc_norm": True, "norm_before_fc": True}}, "fc_norm and norm_before_fc exclude each other"),
        ({"head": {"causal": True}}, "head.causal is for kind dflash, not eagle3"),
        ({"loss": {"anchors": 8}, "kind": "eagle1"}, "loss.anchors is for kind dflash, not eagle1"),
        ({"loss": {"steps": 3}, "kind": "dflash"}, "loss.steps is for kind eagle3 or eagle1 or target, not dflash"),
        ({"loss": {"steps": 3}, "kind": "peagle"}, "loss.steps is for kind eagle3 or eagle1 or target, not peagle"),
        ({"loss": {"retention": 0.5}}, "loss.retention is for kind peagle, not eagle3"),
        ({"head": {"num_depths": 4}}, "head.num_depths is for kind peagle, not eagle3"),
        ({"head": {"qk_norm": True}, "kind": "dflash"}, "head.qk_norm is for kind eagle3 or peagle, not dflash"),
        ({"kind": "dflash"}, "kind dflash needs head.mask_token_id"),
        ({"kind": "peagle"}, "kind peagle needs head.mask_token_id"),
        (
            {"loss": {"labels": "data", "divergence": "kl"}, "kind": "dflash"},
            "labels data are learned by cross-entropy",
        ),
        ({"save_format": "gguf"}, "save_format must be one of official, "),
    ],
)
def test_settings_of_heads_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(target="target", **changes)


def test_a_target_with_experts_is_not_trained(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}))
    assert assemble.source(settings_of(target=str(folder))).config.experts is not None
    with pytest.raises(ValueError, match=r"config\.json: a target with experts cannot be trained here"):
        assemble.source(settings_of(kind="target", model=str(path)))


def test_token_ids_need_no_tokenizer(folder):
    origin = assemble.source(settings_of(target=str(folder)))
    path, settings, said = folder / "data.jsonl", DataSettings(train=("data.jsonl",), row_length=8), []

    def documents():
        return assemble.documents([str(path)], settings, origin, folder / "documents", said.append)

    path.write_text('{"tokens": [3, 4, 5, 6]}\n')
    assert origin.tokenizer is None
    assert documents().tokens.tolist() == documents().tokens.tolist() == [3, 4, 5, 6]
    assert len(said) == 1  # the second read what the first wrote
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="a record of text needs a tokenizer, and there is none"):
        documents()


def test_a_new_head_is_a_layer_of_llama_whatever_its_target():
    """It starts from its target's final norm as a factor, and from its output matrix."""
    fields = CONFIG | dict(model_type="gemma2", head_dim=8, tie_word_embeddings=True)
    target = Llama(config_of(fields), jax.random.key(0))
    settings = settings_of(target="owner/target", head=dict(draft_vocab_size=CONFIG["vocab_size"]))
    config = assemble.head_config(settings, target.config)
    assert config.attention_spec(0).plain and config.activation == "silu" and not config.norm_plus_one
    head = assemble.new_eagle3(Eagle3Draft, config, jax.random.key(1), target, None, print)
    hidden = jax.random.normal(jax.random.key(2), (3, config.hidden_size))
    np.testing.assert_allclose(head.before_logits(hidden), normed(hidden, target.norm, target.config), atol=1e-5)
    np.testing.assert_array_equal(head.output_weight(target), target.output_weight())
