"""What a run starts with: hub ids with a revision, and data of token ids for a target without a tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eagle_jax import Llama, convert
from eagle_jax.models.architectures import config_of
from eagle_jax.models.layers import normed
from eagle_jax.train.config import DataSettings, TrainSettings
from eagle_jax.train.run import assemble
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


def test_the_settings_of_a_head_are_its_config(folder):
    origin = assemble.source(settings_of(target=str(folder)))
    head = {"num_layers": 2, "windows": [8, None], "qk_norm": True, "norm_before_residual": True, "taps": [0, 1]}
    head |= {"fc_norm": True, "norm_output": True, "draft_vocab_size": 9}
    config = assemble.head_config(settings_of(target=str(folder), head=head), origin.config)
    assert {name: getattr(config, name) for name in head} == head | {"windows": (8, None), "taps": (0, 1)}
    plain = assemble.head_config(settings_of(target=str(folder)), origin.config)
    assert (plain.num_layers, plain.windows, plain.norm_output) == (1, (), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"windows": [8]}, "kind": "eagle1"}, "head.windows is for kind eagle3, not eagle1"),
        ({"head": {"num_layers": 2, "windows": [8]}}, "windows has 1 entries for 2 layers"),
        ({"head": {"fc_norm": True, "norm_before_fc": True}}, "fc_norm and norm_before_fc exclude each other"),
        ({"save_format": "gguf"}, "save_format must be one of official, "),
    ],
)
def test_settings_of_heads_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(target="target", **changes)


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
    head = assemble.new_eagle3(config, jax.random.key(1), target, None, print)
    hidden = jax.random.normal(jax.random.key(2), (3, config.hidden_size))
    np.testing.assert_allclose(head.before_logits(hidden), normed(hidden, target.norm, target.config), atol=1e-5)
    np.testing.assert_array_equal(head.output_weight(target), target.output_weight())
