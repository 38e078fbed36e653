"""Files that an earlier version wrote still load, and its run goes on: tests/golden/earlier.tar.xz, of commit 55c459b.

It holds a target and a head (vocabulary 16, width 8) as Hugging Face folders and converted, documents of token ids,
precomputed `features`, and `run`, which ended by SIGTERM after step 2 of 4. The head is that of the whole run.
"""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from eagle_jax import convert
from eagle_jax.models import params
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.run.loop import train


@pytest.fixture
def earlier(golden, tmp_path, monkeypatch):
    """Goes to a folder with these files: the run's settings name them by relative paths."""
    with tarfile.open(golden / "earlier.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def test_a_converted_folder_loads(earlier):
    for ours, theirs in zip(convert.load("converted"), convert.from_pretrained("target", "head"), strict=True):
        arrays, expected = params.flatten(ours), params.flatten(theirs)
        assert arrays.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(arrays[path], array, err_msg=path)


def test_a_run_goes_on_from_its_checkpoint_with_features(earlier):
    settings = TrainSettings(
        kind="eagle3",
        target="target",
        output="run",
        features="features",
        data={"train": ["train.jsonl"], "row_length": 8},
        head={"draft_vocab_size": 8},
        loss={"steps": 1},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        batch_tokens=16,
        steps=4,
        dtype="float32",
        save_dtype="float32",
        checkpoints={"every": 2},
        log_every=1,
    )
    said: list[str] = []
    assert train(settings, said.append) == 0
    assert any("going on from step 2 of 4" in line for line in said)
    expected = load_file("head/model.safetensors")
    for name, array in load_file("run/final/model.safetensors").items():
        np.testing.assert_allclose(array, expected.pop(name), atol=1e-6, err_msg=name)
    assert not expected
