"""Two processes, as on two hosts, generate and train what one does, and go on after one of them was told to end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_jax.cli import main
from eagle_jax.convert import from_pretrained
from eagle_jax.models import params
from eagle_jax.sharding import make_mesh
from eagle_jax.train.data import loader
from eagle_jax.train.run import metrics
from eagle_jax.train.run.processes import EXIT_CODES
from tests.sharding.meshes import child_environment
from tests.sharding.worker import AXES, generated, work
from tests.train.chat_templates import byte_level
from tests.train.models import VOCAB, write_target

STEPS = 6
SPLIT = "mesh={data: 1, fsdp: 2, tensor: 2}"  # batch and parameters over the processes, products inside each
PRODUCTS = "mesh={data: 1, fsdp: 1, tensor: 4}"  # products over both processes, which hold the same rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    write_target(root / "target", byte_level())
    rng = np.random.default_rng(1)
    lines = [json.dumps({"tokens": rng.integers(8, VOCAB, 32).tolist()}) for _ in range(8)]
    (root / "data.jsonl").write_text("\n".join(lines) + "\n")
    settings = dict(
        kind="eagle3",
        target=str(root / "target"),
        data={"train": [str(root / "data.jsonl")], "held_out": [str(root / "data.jsonl")], "row_length": 32},
        head={"draft_vocab_size": 200},
        loss={"steps": 2},
        optimizer={"learning_rate": 1e-3, "schedule": "constant"},
        batch_tokens=128,
        steps=STEPS,
        dtype="float32",
        save_dtype="float32",
        checkpoints={"every": 2},
        evaluation={"every": STEPS, "prompts": 2, "prompt_tokens": 4, "new_tokens": 6, "tree": "chain:2"},
        log_every=1,
    )
    for name in ("one", "two"):
        (root / name).mkdir()
        (root / name / "target").symlink_to(root / "target")
        (root / name / "run.json").write_text(json.dumps(settings | {"output": str(root / name / "out")}))
    return root


def two_processes(folder: Path, *tasks: str) -> list[dict[str, Any]]:
    """The reports of both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, "-W", "error", "-m", "tests.sharding.worker", str(port), str(index), str(folder), *tasks]
        for index in range(2)
    ]
    running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True, env=child_environment()) for c in commands]
    try:
        errors = [process.communicate(timeout=900)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    reports = [json.loads((folder / f"report{index}.json").read_text()) for index in range(2)]
    assert [report["processes"] for report in reports] == [2, 2]
    return reports


@pytest.fixture(scope="module")
def reports(folder) -> list[dict[str, Any]]:
    """Of two processes that generate and begin to train, until the first of them gets SIGTERM."""
    return two_processes(folder / "two", "generate", "end", "train", SPLIT)


def test_two_processes_generate_what_one_does(folder, reports):
    expected = [generated(folder, axes) for axes in AXES]
    assert reports[0]["texts"] == reports[1]["texts"] == expected


def losses(folder: Path) -> list[float]:
    lines = [line for line in metrics.read(folder / "out" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_two_processes_train_what_one_does(folder, reports):
    assert work(folder / "one", ["train", SPLIT])["code"] == 0
    expected = losses(folder / "one")
    assert [report["code"] for report in reports] == [EXIT_CODES[signal.SIGTERM]] * 2
    assert any("ended by SIGTERM after step" in line for line in reports[0]["said"]) and reports[1]["said"] == []
    assert not (folder / "two" / "out" / "final").exists()
    begun = losses(folder / "two")
    assert 2 <= len(begun) < STEPS
    np.testing.assert_allclose(begun, expected[: len(begun)], rtol=1e-6)

    again = two_processes(folder / "two", "train", PRODUCTS)
    assert [report["code"] for report in again] == [0, 0]
    assert any(f"going on from step {len(begun)} of {STEPS}" in line for line in again[0]["said"])
    np.testing.assert_allclose(losses(folder / "two"), expected, rtol=1e-5)
    last, theirs = (metrics.read(folder / name / "out" / "metrics.jsonl")[-1] for name in ("two", "one"))
    assert last["tokens_a_cycle"] == theirs["tokens_a_cycle"]
    np.testing.assert_allclose(last["held_out_loss"], theirs["held_out_loss"], rtol=1e-5)
    heads = [from_pretrained(folder / "target", folder / name / "out" / "final")[1] for name in ("two", "one")]
    ours, expected_head = map(params.flatten, heads)
    for path, array in expected_head.items():
        np.testing.assert_allclose(ours[path], array, atol=1e-4, err_msg=path)
    names = [{path.name for path in (folder / name / "out").iterdir()} for name in ("two", "one")]
    names[0].remove("settings_history.jsonl")  # its mesh changed
    assert names[0] == names[1] >= {"final", "best", "plot.png", "settings.yaml", "metrics.jsonl", "tensorboard"}


def test_a_process_alone_makes_every_row():
    assert loader.own_blocks(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})) == ([0, 1, 2, 3], 4)


@pytest.mark.parametrize("where", ["host0", "host0:9000", "host0:9000,2,2", "host0:9000,two,0"])
def test_an_address_that_is_none_is_refused(folder, where, capsys):
    assert main(["train", "--config", str(folder / "one" / "run.json"), "--distributed", where]) == 2
    assert "--distributed is alone, or HOST:PORT,N,I" in capsys.readouterr().err
