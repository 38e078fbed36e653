"""What a run starts with: hub ids with a revision, and data of token ids for a target without a tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from eagle_jax import convert
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
