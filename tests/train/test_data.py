"""Documents on disk, rows, batches, the draft's vocabulary, and settings."""

from __future__ import annotations

import collections
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_jax.files import checksums
from eagle_jax.train.config import read_settings
from eagle_jax.train.data import dataset, loader
from eagle_jax.train.run import assemble
from tests.train.chat_templates import byte_level

SETTINGS = """\
kind: eagle3
target: target/
output: out/
data: {train: [a.jsonl], row_length: 64}
batch_tokens: 256
steps: 10
"""


def made(tmp_path, lengths, seed: int = 0) -> dataset.Dataset:
    rng = np.random.default_rng(seed)
    records = [SimpleNamespace(tokens=rng.integers(0, 50, n), loss_mask=rng.integers(0, 2, n)) for n in lengths]
    written = dataset.write(tmp_path / "data", records, {"made": "here"})
    for index, record in enumerate(records):
        tokens, mask = written.document(index)
        np.testing.assert_array_equal(tokens, record.tokens)
        np.testing.assert_array_equal(mask, record.loss_mask)
    return written


def test_documents_are_written_whole_or_not_at_all(tmp_path):
    assert made(tmp_path, [3, 1, 7]).lengths.tolist() == [3, 1, 7]
    assert dataset.about(tmp_path / "data") == {"made": "here"}

    def broken():
        yield SimpleNamespace(tokens=[1], loss_mask=[1])
        raise ValueError("line 2")

    with pytest.raises(ValueError, match="line 2"):
        dataset.write(tmp_path / "data", broken(), {})
    assert len(dataset.read(tmp_path / "data")) == 3
    with pytest.raises(ValueError, match="no document"):
        dataset.write(tmp_path / "other", [], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert dataset.about(tmp_path / "other") is None


def test_damaged_documents_are_named(tmp_path):
    """Every file, in content and in length; what an older version wrote has no checksums, but its lengths are seen."""
    made(tmp_path, [3, 1, 7])
    for name in ("tokens.npy", "mask.npy", "offsets.npy", "about.json"):
        path = tmp_path / "data" / name
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(ValueError, match=rf"data: {name} is damaged .*remove this folder"):
            dataset.read(tmp_path / "data")
        path.write_bytes(content[:-2])
        with pytest.raises(ValueError, match=rf"data: {name} has .* bytes, .*remove this folder"):
            dataset.read(tmp_path / "data")
        path.write_bytes(content)
    (tmp_path / "data" / checksums.NAME).unlink()
    assert len(dataset.read(tmp_path / "data")) == 3
    (tmp_path / "data" / "mask.npy").unlink()
    with pytest.raises(ValueError, match=r"mask\.npy.*remove this folder"):
        dataset.read(tmp_path / "data")
    for content in ("{", "[]"):
        (tmp_path / "data" / "about.json").write_text(content)
        with pytest.raises(ValueError, match=r"about\.json: .*remove this folder"):
            dataset.about(tmp_path / "data")


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("eagle3", {"tokens": [1, 2, 3], "loss_mask": [1, 1, 0]}, "no loss sees a token to learn"),
        ("eagle3", {"tokens": [1, 2]}, "no loss sees a token to learn"),
        ("eagle1", {"tokens": [1]}, "no loss sees a token to learn"),
        ("target", {"tokens": [1, 2], "loss_mask": [1, 0]}, "no loss sees a token to learn"),
        ("eagle3", {"tokens": [1, 2, 3], "loss_mask": [0, 0, 0]}, "3 nothing to learn"),
        ("eagle3", {"tokens": [1] * 64 + [2], "loss_mask": [0] * 64 + [1]}, "3 nothing to learn"),
        ("eagle3", {"text": 7}, "3 unknown format"),
    ],
)
def test_a_run_with_nothing_to_learn_is_refused_with_the_reasons(tmp_path, kind, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(line)}\n" * 3)
    (tmp_path / "run.yaml").write_text(SETTINGS)
    overrides = [f"kind={kind}", *(["model=config.json", "target=null"] if kind == "target" else [])]
    settings = read_settings(tmp_path / "run.yaml", [*overrides, "data.on_error=skip"])
    origin = assemble.DataSource(
        tmp_path, byte_level(), SimpleNamespace(vocab_size=50), assemble.predicted_by(settings)
    )
    said: list[str] = []
    with pytest.raises(ValueError, match=f"there is no document to learn from in .*a.jsonl: of 3 lines none.*{says}"):
        assemble.documents([str(path)], settings.data, origin, tmp_path / "data", said.append)
    assert "0 records of 3 lines" in said[0] and said[0].count(f"{path}:") == (3 if "3 " in says else 0)
    assert not (tmp_path / "data").exists()
    # Beside one that can be learned from, they are counted.
    path.write_text(path.read_text() + json.dumps({"tokens": [1, 2, 3, 4]}))
    assert len(assemble.documents([str(path)], settings.data, origin, tmp_path / "data", said.append)) == 1
    assert ("3 documents left out" in said[1]) == ("3 lines not used" not in said[1])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(0, 3))
def test_rows_hold_every_document_once_and_are_well_filled(lengths, seed):
    rows = dataset.pack(lengths, 20, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 20
    if len(rows) <= dataset.OPEN_ROWS and len(rows) > 1:  # no two open rows would fit into one
        assert sum(sorted(filled)[:2]) > 20


def test_a_packed_row(tmp_path):
    data = made(tmp_path, [3, 1, 7])
    row = data.row([2, 0], 12)
    assert row["tokens"].tolist() == [*data.document(2)[0], *data.document(0)[0], 0, 0]
    assert row["loss_mask"].tolist() == [*data.document(2)[1], *data.document(0)[1], 0, 0]
    assert row["documents"].tolist() == [0] * 7 + [1] * 3 + [2] * 2 and row["lengths"] == 10


def test_buckets():
    assert dataset.in_buckets([4, 5, 8, 1, 16], (4, 8, 16)) == {4: [[0], [3]], 8: [[1], [2]], 16: [[4]]}


def test_batches_go_through_every_row_each_epoch_in_an_order_that_can_be_taken_up(tmp_path):
    data = made(tmp_path, [4] * 12)
    rows = {4: [[index] for index in range(12)]}
    batches = loader.batches(data, rows, {4: 4}, seed=1)
    epochs = []
    for epoch in range(2):
        seen = [tuple(row) for step in range(3) for row in batches[3 * epoch + step]["tokens"].tolist()]
        assert collections.Counter(seen) == collections.Counter(tuple(data.document(i)[0].tolist()) for i in range(12))
        epochs.append(seen)
    assert epochs[0] != epochs[1]

    first = loader.iterator(batches)
    for _ in range(4):
        next(first)
    place = first.get_state()
    expected = [next(first) for _ in range(3)]
    again = loader.iterator(loader.batches(data, rows, {4: 4}, seed=1))
    again.set_state(place)
    for batch in expected:
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])

    halves = [loader.batches(data, rows, {4: 4}, seed=1, blocks=[p], of=2)[5]["tokens"] for p in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), batches[5]["tokens"])


def test_batches_of_buckets_have_one_length_each_and_their_share(tmp_path):
    data = made(tmp_path, [4] * 8 + [8] * 4)
    rows = dataset.in_buckets(data.lengths, (4, 8))
    batches = loader.batches(data, rows, {4: 2, 8: 1}, seed=0)
    shapes = collections.Counter(batches[step]["tokens"].shape for step in range(16))
    assert shapes == {(2, 4): 8, (1, 8): 8}
    assert loader.steps_of(rows, {4: 2, 8: 1}, 2) == 16


def test_the_draft_s_vocabulary_is_what_is_learned_most_often():
    #                        7 is frequent, but not learned; 2 and 5 tie, the lower id wins
    tokens = np.array([7, 7, 7, 7, 1, 1, 1, 5, 5, 2, 2, 9])
    mask = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], np.uint8)
    data = dataset.Dataset(tokens, mask, np.array([0, 12]))
    ids, coverage = assemble.frequent_tokens(data, 10, 2)
    assert ids.tolist() == [1, 2] and ids.dtype == np.int32 and coverage == 5 / 8


def test_settings_are_read_with_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS)
    settings = read_settings(path, ["optimizer.learning_rate=1e-3", "loss.steps=2", "data.held_out=[b.jsonl]"])
    assert settings.optimizer.learning_rate == 1e-3 and settings.loss.weights == (1.0, 0.8)
    assert settings.data.held_out == ("b.jsonl",) and settings.rows(64) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate: no such setting"),
        ("nonsense=1", "nonsense: no such setting"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: .*number"),
        ("kind=eagle2", "kind: .*'eagle3', 'eagle1', 'peagle', 'dflash' or 'target'"),
        ("epochs=1", "steps or epochs"),
        ("kind=target", "kind target needs model"),
        ("loss.alignment=official", "set data.packing: false"),
        ("loss.step_weights=[1]", "step_weights has 1 entries for 7 steps"),
        ("data.buckets=[32,64]", "set packing: false"),
        ("data.row_length=512", "make 0 rows of 512"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: .*finite"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1: .*less than 1"),
        ("seed=-1", "seed: .*greater"),
        ("steps=10000000000", "steps: .*less than"),
        ("head.head_dim=7", "head.head_dim: .*multiple of 2"),
        ("head.taps=[]", "head.taps: .*at least 1"),
        ("mesh.fsdp=3", "mesh.fsdp = 3 does not divide"),
        ("data.train=[]", "name at least one file"),
        ("steps", "key=value"),
        ("kind.deep=1", "kind is no section"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS)
    with pytest.raises(ValueError, match=message):
        read_settings(path, [override])
    assert read_settings(path).steps == 10
