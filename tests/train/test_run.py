"""Whole runs through the real entry: ended in any way they go on bit for bit, and heads learn what they are taught."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import eagle_jax
from eagle_jax.cli import main
from eagle_jax.convert import from_pretrained
from eagle_jax.drafts.registry import CLASSES
from eagle_jax.files.lock import Locked, locked_folder
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from eagle_jax.train.config import OptimizerSettings, TrainSettings, read_settings
from eagle_jax.train.run import evaluate, loop, metrics, processes, resume
from eagle_jax.train.run.clock import Clock
from eagle_jax.train.run.loop import train
from eagle_jax.train.run.precompute import precompute
from eagle_jax.train.run.save import check_range, save_target
from tests.sharding.meshes import child_environment
from tests.train.chat_templates import byte_level
from tests.train.models import VOCAB, write_target

TOTAL, EVERY = 12, 4
ONE_PASS: dict[str, dict[str, Any]] = {
    "dflash": {
        "head": {"mask_token_id": 7, "block_size": 5, "num_layers": 2, "windows": [6, None]},
        "loss": {"anchors": 64, "labels": "data", "position_decay": 8},
    },
    "peagle": {
        "head": {"mask_token_id": 7, "num_depths": 4, "num_layers": 2, "windows": [6, None], "qk_norm": True},
        "loss": {"objective": "lk_adaptive", "least_retention": 0.5},
        "save_format": "speculators",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target, and documents of token ids: its own greedy text."""
    root = tmp_path_factory.mktemp("run")
    write_target(root / "target", byte_level())
    target, _ = from_pretrained(root / "target")
    sure = params.flatten(target)["lm_head"] * 8  # of its next token
    target = params.load(target, params.flatten(target) | {"lm_head": sure})
    save_target(target, root / "target-source" / "config.json", root / "target", "float32")
    prompts = np.random.default_rng(1).integers(8, VOCAB, (8, 6)).astype(np.int32)
    out = eagle_jax.generate(target, None, prompts, np.full(8, 6), max_new_tokens=26)
    lines = [json.dumps({"tokens": row}) for row in np.asarray(out.tokens).tolist()]
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return root


def settings_of(folder: Path, output: str, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = dict(
        kind="eagle3",
        target=str(folder / "target"),
        output=str(folder / output),
        data={"train": [str(folder / "train.jsonl")], "row_length": 64},
        head={"draft_vocab_size": 200},
        loss={"steps": 3},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        batch_tokens=128,
        steps=TOTAL,
        dtype="float32",
        save_dtype="float32",
        checkpoints={"every": EVERY},
        log_every=1,
    )
    return TrainSettings(**values | changes)


def quiet(message: str) -> None:
    del message


def weights(settings: TrainSettings, which: str = "final") -> dict[str, np.ndarray]:
    return load_file(Path(settings.output) / which / "model.safetensors")


def assert_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.fixture(scope="module")
def whole(folder) -> TrainSettings:
    """A run that nothing interrupted."""
    settings = settings_of(folder, "whole")
    assert train(settings, quiet) == 0
    return settings


def test_a_new_head_begins_with_the_target_s_output(folder):
    """Its last norm, and its rows of the draft's vocabulary: a step of almost no length leaves them as they were."""
    settings = settings_of(folder, "new", optimizer={"learning_rate": 1e-30}, steps=1)
    assert train(settings, quiet) == 0
    head, target = weights(settings), load_file(folder / "target" / "model.safetensors")
    ids = head["d2t"] + np.arange(len(head["d2t"]))
    np.testing.assert_array_equal(head["lm_head.weight"], target["lm_head.weight"][ids])
    np.testing.assert_array_equal(head["norm.weight"], target["model.norm.weight"])


def until(settings: TrainSettings, folder: Path, step: int, number: int) -> int:
    """Starts the command line's run, sends it a signal once `step` is logged, and returns its exit code."""
    path = folder / "killed.yaml"
    path.write_text(settings.model_dump_json())
    command = [sys.executable, "-m", "eagle_jax", "train", "--config", str(path)]
    environment = child_environment() | {"JAX_NUM_CPU_DEVICES": "8"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if f"step {step}/" in line:
                process.send_signal(number)
        assert any(f"step {step}/" in line for line in lines), "".join(lines)
    return process.returncode


def test_killed_and_taken_up_again_is_the_same_run(folder, whole):
    settings = settings_of(folder, "killed")
    assert until(settings, folder, 10, signal.SIGKILL) == -signal.SIGKILL
    said: list[str] = []
    assert train(settings, said.append) == 0
    assert any("going on from step 8 of 12" in line or "going on from step 4 of 12" in line for line in said)
    assert_bits(weights(settings), weights(whole))
    lines, expected = (metrics.read(Path(run.output) / "metrics.jsonl") for run in (settings, whole))
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_saves_and_the_run_goes_on(folder, whole, number, code, name):
    settings = settings_of(folder, name, checkpoints={"every": 100})
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if "step 5/" in message:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    assert train(settings, say, "eagle-jax train --config run.yaml") == code
    assert signal.getsignal(number) is before
    assert any(f"{name}: this step is finished and saved first" in line for line in said)
    assert f"ended by {name} after step 5 of {TOTAL}, which is saved; to go on from there: eagle-jax train" in said[-1]
    said.clear()
    assert train(settings, said.append) == 0
    assert any(f"going on from step 5 of {TOTAL}" in line for line in said)
    assert said[-1] == f"done: the run has all of its {TOTAL} steps"
    assert_bits(weights(settings), weights(whole))


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    said: list[str] = []
    ended = threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(processes.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with processes.termination(said.append) as ends_with:
        assert ends_with(1) == 0
        signal.raise_signal(signal.SIGINT)
        assert ends_with(2) == 130 and not codes
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(10)
    assert codes == [130] and "Ctrl-C again ends at once" in said[0]


def test_a_checkpoint_restores_onto_another_mesh(folder, whole):
    settings = settings_of(folder, "mesh", steps=EVERY)
    assert train(settings, quiet) == 0
    assert train(settings_of(folder, "mesh", mesh={"data": 1, "fsdp": 2, "tensor": 2}), quiet) == 0
    ours, theirs = weights(settings), weights(whole)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name].astype(float), array.astype(float), atol=2e-4, err_msg=name)


def test_a_run_is_not_gone_on_with_under_other_settings(folder, whole):
    with pytest.raises(ValueError, match=r"other settings \(loss, seed\): loss.steps was 3, is 2, seed was 0, is 1"):
        train(settings_of(folder, "whole", seed=1, loss={"steps": 2}), quiet)
    with pytest.raises(ValueError, match=r"optimizer.name was adamw, is muon; choose another output"):
        train(settings_of(folder, "whole", optimizer={"name": "muon"}), quiet)


def test_another_spelling_of_a_path_is_the_same_setting(folder, whole):
    same = settings_of(folder, "whole", target=f"{folder}/./target/", data=whole.data.model_dump(), steps=TOTAL + 1)
    assert resume.changes(Path(whole.output), same) == {"steps": (TOTAL, TOTAL + 1)}


def test_precomputing_does_not_change_the_data_of_a_run(folder, whole, tmp_path):
    shutil.copy(folder / "train.jsonl", tmp_path / "train.jsonl")
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    changed = settings_of(folder, "whole", data={"train": [str(tmp_path / "train.jsonl")], "row_length": 64})
    with pytest.raises(ValueError, match=r"the data changed since this run began \(files\)"):
        precompute(changed, tmp_path / "features", quiet)


def test_two_runs_do_not_share_an_output(folder, whole):
    with locked_folder(Path(whole.output), quiet), pytest.raises(Locked, match="another run writes there"):
        train(whole, quiet)


def test_a_run_from_before_a_setting_existed_is_gone_on_with(folder, whole, tmp_path):
    settings = settings_of(tmp_path, "old", target=whole.target, data=whole.data, steps=EVERY)
    assert train(settings, quiet) == 0
    path = Path(settings.output) / "settings.yaml"
    old = yaml.safe_load(path.read_text())
    del old["head"]["head_dim"], old["loss"]["feature_weight"]
    path.write_text(yaml.safe_dump(old))
    assert train(settings.model_copy(update={"steps": TOTAL}), quiet) == 0
    assert_bits(weights(settings), weights(whole))


@pytest.mark.parametrize(("kind", "other"), [("eagle3", "vllm"), ("eagle1", "sglang")])
def test_a_head_that_could_not_be_written_is_refused_before_it_is_trained(folder, kind, other):
    settings = settings_of(folder, f"{kind}-wide", kind=kind, head={"head_dim": 24})
    with pytest.raises(ConfigError, match="head_dim is 24, it takes hidden_size / heads only"):
        train(settings, quiet)
    assert not (Path(settings.output) / "checkpoints").exists()
    assert not (Path(settings.output) / "settings.yaml").exists()  # so the same output is free for other settings
    assert train(settings.model_copy(update={"save_format": other, "steps": 1}), quiet) == 0
    _, head = from_pretrained(settings.target, Path(settings.output) / "final")
    assert head.config.head_dim == 24


def test_a_head_of_many_parts_is_trained_saved_and_read(folder):
    """A step moves every norm, and a format that cannot hold the head is refused before it."""
    parts = {"num_layers": 2, "windows": [4, None], "fc_norm": True, "norm_output": True}
    settings = settings_of(folder, "parts", head={"draft_vocab_size": 200, "norm_before_residual": True, **parts})
    with pytest.raises(ConfigError, match=r"fc_norm is true.*it has 2 layers.*that can hold it: speculators"):
        train(settings, quiet)
    assert train(settings.model_copy(update={"save_format": "speculators", "steps": 1}), quiet) == 0
    _, head = from_pretrained(settings.target, Path(settings.output) / "final")
    config = head.config
    assert (config.num_layers, config.windows, config.fc_norm, config.norm_output) == (2, (4, None), True, True)
    norms = {path: np.asarray(array) for path, array in params.flatten(head).items() if "norm" in path}
    assert {"layers.1.input_norm", "layer.hidden_norm", "fc_norm.2", "norm"} <= norms.keys()
    assert all((array != 1).all() for array in norms.values())  # they began as ones


@pytest.mark.parametrize("kind", ["eagle1", "peagle", "dflash", "target"])
def test_other_kinds_are_resumed_bit_for_bit(folder, kind):
    changes: dict[str, Any] = {"kind": kind, "head": {}, "accumulation": 2}
    if kind == "target":
        changes |= {"target": None, "model": str(folder / "target" / "config.json")}
    changes |= ONE_PASS.get(kind, {})
    straight, halves = settings_of(folder, f"{kind}-a", **changes), settings_of(folder, f"{kind}-b", **changes)
    assert train(straight, quiet) == 0
    assert train(halves.model_copy(update={"steps": 7}), quiet) == 0
    assert train(halves, quiet) == 0
    assert_bits(weights(halves), weights(straight))
    losses = [line["loss"] for line in metrics.read(Path(straight.output) / "metrics.jsonl")]
    assert losses[-1] < losses[0]


# EAGLE-1 learns no later step; the others get as many tokens a cycle as they learned depths, and the target's own.
@pytest.mark.parametrize(
    ("kind", "depth"),
    [("eagle3", 3), ("eagle1", 1), *(pytest.param(kind, 4, marks=pytest.mark.slow) for kind in ONE_PASS)],
)
def test_a_head_that_knows_a_text_by_heart_has_every_draft_accepted(folder, kind, depth):
    data = {"train": [str(folder / "train.jsonl")], "held_out": [str(folder / "train.jsonl")], "row_length": 64}
    own = ONE_PASS.get(kind, {"head": {}, "loss": {"steps": 3, "noise": False, "token_weight": 1.0}})
    settings = settings_of(
        folder,
        f"{kind}-overfit",
        kind=kind,
        data=data,
        **own,
        steps=300,
        batch_tokens=256,
        optimizer={"learning_rate": 1e-2, "schedule": "linear", "warmup_steps": 10, "clip_norm": 1.0},
        checkpoints={"every": 1000},
        evaluation={"every": 150, "prompts": 8, "prompt_tokens": 6, "new_tokens": 20, "tree": f"chain:{depth}"},
        log_every=50,
    )
    said: list[str] = []
    assert train(settings, said.append) == 0
    lines = [line for line in metrics.read(Path(settings.output) / "metrics.jsonl") if "reached" in line]
    assert [line["step"] for line in lines] == [150, 300]
    assert lines[-1]["reached"] == [1.0] * depth, said  # every drafted token, so depth + 1 a cycle
    assert lines[-1]["tokens_a_cycle"] > 0.8 * (depth + 1)  # the last cycle of a row is cut off at its end
    assert {path.name for path in Path(settings.output).iterdir()} >= {"best", "final", "plot.png", "tensorboard"}
    target, head = from_pretrained(folder / "target", Path(settings.output) / "best")
    assert isinstance(head, CLASSES[kind])
    chain = eagle_jax.StaticTree.chain(depth)
    assert eagle_jax.propose(target, head, np.ones((1, 4), np.int32), np.array([4]), tree=chain).tokens.shape[0] == 1


def test_text_that_is_not_the_target_s_own_ends_the_evaluation(folder):
    target, _ = from_pretrained(folder / "target")
    prompts = evaluate.plain_text(target, [np.arange(10, 16)], 8, ())
    assert evaluate.check_equal(target, prompts, prompts.plain, prompts.ends) == 0
    wrong = prompts.plain.copy()
    wrong[0, 9] = (wrong[0, 9] + 1) % VOCAB
    with pytest.raises(evaluate.NotLossless, match="prompt 1, position 9"):
        evaluate.check_equal(target, prompts, wrong, prompts.ends)
    early = np.where(np.arange(prompts.plain.shape[1])[None] < 13, prompts.plain, 0)  # a text that ends early
    with pytest.raises(evaluate.NotLossless, match="position 13"):
        evaluate.check_equal(target, prompts, early, prompts.ends - 1)


def test_the_plain_texts_are_what_the_target_wrote():
    rows = np.array([[9, 9, 1, 2, 3, 4, 5, 6, 7], [9, 1, 1, 1, 1, 1, 1, 1, 0]])
    prompts = evaluate.Prompts(rows[:, :2], np.array([2, 1]), rows, np.array([9, 8]))
    assert prompts.new_tokens == [[1, 2, 3, 4, 5, 6, 7], [1] * 7]


def test_bad_data_is_named_and_leaves_no_run_behind(folder):
    (folder / "bad.jsonl").write_text((folder / "train.jsonl").read_text() + "{\n")
    data = {"train": [str(folder / "bad.jsonl")], "row_length": 64}
    with pytest.raises(ValueError, match=r"bad\.jsonl:9: invalid JSON"):
        train(settings_of(folder, "bad", data=data), quiet)
    said: list[str] = []
    skipping = settings_of(folder, "bad", data=data | {"on_error": "skip"})
    assert train(skipping, said.append) == 0
    assert "1 invalid JSON" in said[0]
    (folder / "bad.jsonl").write_text((folder / "train.jsonl").read_text() * 2)
    with pytest.raises(ValueError, match=r"the data changed since this run began \(files\)"):
        train(skipping, quiet)


def test_a_run_that_diverges_keeps_what_was_good_and_goes_on_with_other_settings(folder, whole):
    """Divergence is found when a checkpoint is due, too, and none of it is kept."""
    settings = settings_of(folder, "hot", steps=TOTAL + 8, log_every=3)
    output = Path(shutil.copytree(whole.output, settings.output))
    constant = {"schedule": "constant", "learning_rate": 1e38, "clip_norm": None}
    hot = settings.model_copy(update={"optimizer": OptimizerSettings(**constant)})
    fix = r"lower optimizer\.learning_rate \(it is 1e\+38\) or set optimizer\.clip_norm: .*goes on from step 12"
    with pytest.raises(ValueError, match=rf"(the loss is|NaN or infinite) .*step 1[3-6].*; {fix}"):
        train(hot, quiet)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"8", "12"}
    cool = OptimizerSettings(**constant | {"learning_rate": 1e-4, "clip_norm": 0.25})
    said: list[str] = []
    assert train(settings.model_copy(update={"optimizer": cool}), said.append) == 0
    assert any("optimizer.learning_rate 1e+38 -> 0.0001, optimizer.clip_norm none -> 0.25" in line for line in said)
    assert all(np.isfinite(array.astype(float)).all() for array in weights(settings).values())
    lines = [json.loads(line) for line in (output / "settings_history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [12, 12]
    assert lines[-1]["changed"]["optimizer.clip_norm"] == [None, 0.25] and "steps" in lines[0]["changed"]
    assert read_settings(output / "settings.yaml").optimizer == cool
    rates = [line["learning_rate"] for line in metrics.read(output / "metrics.jsonl")]
    np.testing.assert_allclose(rates, [1e-2] * TOTAL + [1e-4] * 3)


def test_a_damaged_checkpoint_is_said_and_the_run_goes_on_from_the_one_before(folder, whole):
    settings = settings_of(folder, "damaged")
    shutil.copytree(whole.output, settings.output)
    cut = Path(settings.output) / "checkpoints" / "12" / "place" / "metadata"
    cut.write_text("{")
    said: list[str] = []
    assert train(settings, said.append) == 0
    assert any("12: place/metadata has 1 bytes" in line and "step 8 the last usable" in line for line in said)
    assert f"going on from step 8 of {TOTAL}" in said
    assert_bits(weights(settings), weights(whole))


def test_text_that_is_not_the_target_s_own_ends_the_run_with_its_step_saved(folder, monkeypatch, capsys):
    class Evaluator:
        def __init__(self, *args: Any):
            pass

        def __call__(self, masters: Any):
            raise evaluate.NotLossless("prompt 1, position 9")

    monkeypatch.setattr(loop, "Evaluator", Evaluator)
    data = {"train": [str(folder / "train.jsonl")], "held_out": [str(folder / "train.jsonl")], "row_length": 64}
    settings = settings_of(folder, "unfaithful", data=data, evaluation={"every": 3})
    path = folder / "unfaithful.yaml"
    path.write_text(settings.model_dump_json())
    assert main(["train", "--config", str(path)]) == 1
    assert "error: prompt 1, position 9" in capsys.readouterr().err

    def full(*args: Any, **options: Any) -> int:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(loop, "train", full)
    assert main(["train", "--config", str(path)]) == 2
    assert "error: the device's memory is too small: raise accumulation" in capsys.readouterr().err
    assert [path.name for path in (Path(settings.output) / "checkpoints").iterdir()] == ["3"]


def test_the_clock_leaves_out_what_is_no_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(40, 100)
    now[0] += 60
    clock.leave_out(60, steps=1)  # the first step compiles
    assert np.isnan(clock.rate(41))
    now[0] += 9
    assert clock.rate(50) == clock.rate(50) == 1.0 and clock.left(50).total_seconds() == 50
    now[0] += 40
    clock.leave_out(30)  # an evaluation
    now[0] += 10  # it became slower
    assert clock.rate(60) == 0.5 and clock.left(60).total_seconds() == 80


def test_the_log_has_the_learning_rate_and_a_running_mean_of_the_loss(whole):
    lines = metrics.read(Path(whole.output) / "metrics.jsonl")
    losses = [line["loss"] for line in lines]
    np.testing.assert_allclose([line["loss_mean"] for line in lines], np.cumsum(losses) / np.arange(1, TOTAL + 1))
    assert {line["learning_rate"] for line in lines} == {1e-2}
    assert "tokens_a_second" not in lines[0] and all(line["tokens_a_second"] > 0 for line in lines[1:])


def test_damaged_lines_of_the_metrics_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\n[2]\n{"loss": 3}\n{"step": 4}\n{"step": 5')
    assert metrics.read(path) == [{"step": 1}, {"step": 4}]


def test_a_number_that_the_written_dtype_cannot_hold_is_refused(folder, whole):
    target, _ = from_pretrained(folder / "target")
    large = params.load(target, params.flatten(target) | {"lm_head": params.flatten(target)["lm_head"] * 1e6})
    check_range(large, "bfloat16")
    with pytest.raises(ValueError, match=r"lm_head holds .*float16 at most 6.55e\+04: set save_dtype"):
        check_range(large, "float16")


def test_a_run_starts_from_a_model_of_its_kind(folder, whole):
    head = str(Path(whole.output) / "final")
    more = settings_of(folder, "more", start=head, steps=1, optimizer={"learning_rate": 1e-9, "schedule": "constant"})
    assert train(more, quiet) == 0
    for name, array in weights(whole).items():
        np.testing.assert_allclose(weights(more)[name].astype(float), array.astype(float), atol=1e-7, err_msg=name)
    with pytest.raises(ValueError, match="is a Eagle3Draft, kind is eagle1"):
        train(settings_of(folder, "wrong", kind="eagle1", start=head, head={}), quiet)
    shape = folder / "target" / "config.json"
    with pytest.raises(ValueError, match="another config"):
        changes = json.loads(shape.read_text()) | {"rope_theta": 500.0}
        (folder / "target" / "other.json").write_text(json.dumps(changes))
        other = str(folder / "target" / "other.json")
        start = str(folder / "target")
        train(settings_of(folder, "other", kind="target", target=None, model=other, start=start, head={}), quiet)
