"""eagle-jax generate --prompts, and stop strings. One capacity and one tree, so that each batch size compiles once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eagle_jax
from eagle_jax import (
    SamplingConfig,
    TreeConfig,
    api,
    convert,
)
from eagle_jax.cli import batch, main
from eagle_jax.cli.answers import Job, Rules, answer_turns
from eagle_jax.cli.options import model_options, sampling_options
from eagle_jax.cli.options.sampling_options import add_sampling_arguments, model_asks, sampling_config
from eagle_jax.cli.results import is_last, read_finished
from eagle_jax.cli.text import Detokenizer, Ends
from eagle_jax.convert.hub import Hub
from eagle_jax.files.lock import locked_file
from eagle_jax.files.prompts import Prompt
from eagle_jax.files.resumable import HeadedLines
from eagle_jax.serving import RunningBatch, run
from tests.pickled import readable
from tests.scripted import ScriptedBatch
from tests.test_cli import byte_tokenizer, converted_pair

PROMPTS = ["def __len__(self):\n", "import os", "class Error(Exception):\n"]
SAMPLED = ["--temperature", "0.8", "--top-p", "0.95", "--seed", "7", "--num-samples", "2", "--log-probs"]
OPTIONS = ["--tree", "3,2,5", "--max-new-tokens", "24", *SAMPLED]


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_pair(golden, tmp_path_factory.mktemp("batch"))


@pytest.fixture
def write(folder, tmp_path):
    """Runs the command on PROMPTS; returns its exit code and the lines of its file without the settings."""
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join([json.dumps(PROMPTS[0]), json.dumps({"tokens": list(PROMPTS[1].encode())}), json.dumps(PROMPTS[2])])
    )

    def command(*options: str, out: str = "out.jsonl") -> tuple[int, list[dict]]:
        files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / out)]
        code = main(["generate", "--model", str(folder), *files, *OPTIONS, *options])
        lines = (tmp_path / out).read_text().splitlines() if (tmp_path / out).exists() else []
        return code, sorted(map(json.loads, lines[1:]), key=lambda line: (line["index"], line.get("sample")))

    return command


@pytest.fixture(scope="module")
def expected(folder) -> list[dict]:
    """The lines that the library's texts make, but for cycles."""
    target, draft = convert.load(folder)
    tokens, lengths = eagle_jax.pad([list(prompt.encode()) for prompt in PROMPTS])
    out = eagle_jax.generate(
        target,
        draft,
        tokens,
        lengths,
        jax.random.key(7),
        tree=TreeConfig(3, 2, 5),
        sampling=SamplingConfig(temperature=0.8, top_p=0.95),
        max_new_tokens=24,
        stop_tokens=(129,),
        num_samples=2,
        log_probs=True,
    )
    lines = []
    for row, (index, sample) in enumerate((index, sample) for index in range(3) for sample in range(2)):
        new = slice(int(lengths[index]), int(out.lengths[row]))
        ids = np.asarray(out.tokens[row, new]).tolist()
        lines.append(
            {
                "index": index,
                "sample": sample,
                "prompt": None if index == 1 else PROMPTS[index],
                "text": byte_tokenizer().decode(ids),
                "tokens": ids,
                "finish": "stop" if ids[-1] == 129 else "length",
                "cycles": int(out.cycles[row]),
                "log_probs": pytest.approx(np.asarray(out.log_probs[row, new]).tolist(), abs=1e-4),
            }
        )
    return lines


def test_the_texts_are_the_library_s_in_any_batch_and_after_a_crash(write, expected, tmp_path, monkeypatch, capsys):
    assert write("--batch", "3") == (0, expected)
    assert "6 texts" in capsys.readouterr().err

    advance = RunningBatch.advance
    calls = []

    def interrupted(batch, cycles):
        calls.append(cycles)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return advance(batch, cycles)

    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "advance", interrupted)
        code, lines = write("--batch", "1", out="again.jsonl")
    assert code == 130
    assert 0 < len(lines) < 6 and lines == expected[: len(lines)]
    with open(tmp_path / "again.jsonl", "a") as file:
        file.write('{"index": 2, "te')
    assert write("--batch", "1", out="again.jsonl") == (0, expected)
    capsys.readouterr()
    assert write("--batch", "1", out="again.jsonl") == (0, expected)
    assert "All 6 texts are in" in capsys.readouterr().err


def test_a_file_goes_on_with_the_same_weights_whatever_their_folder_is_called(
    write, folder, expected, tmp_path, monkeypatch, capsys
):
    assert write("--batch", "3") == (0, expected)
    out = tmp_path / "out.jsonl"
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.chdir(folder.parent)
    (tmp_path / "link").symlink_to(folder)
    load = model_options.load_models
    for name in ("converted", f"{folder}/", str(tmp_path / "link")):
        code, lines = write("--batch", "3", "--model", name)
        assert (code, lines) == (0, expected)

    def other(args):
        loaded = load(args)
        halves = jax.tree.map(lambda x: x / 2, getattr(loaded, part))
        return dataclasses.replace(loaded, **{part: halves})

    monkeypatch.setattr(model_options, "load_models", other)
    before = out.read_text()
    for part in ("target", "draft"):
        capsys.readouterr()
        assert write("--batch", "3")[0] == 2
        assert f"was written with other settings ({part}_weights " in capsys.readouterr().err
    assert out.read_text() == before


def test_two_runs_do_not_write_one_file(write, tmp_path, capsys):
    with locked_file(tmp_path / "out.jsonl", print):
        assert write() == (2, [])
    assert "out.jsonl: another run writes there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_another_tree_is_another_setting(write, expected, capsys):
    write("--batch", "3")
    assert write("--batch", "3", "--tree", "3,2,4")[0] == 2
    assert re.search(r"\(tree .*num_nodes=5.*, now .*num_nodes=4.*\); go on with those", capsys.readouterr().err)
    assert write("--batch", "1") == (0, expected)


def test_another_run_s_file_is_refused(write, tmp_path, capsys):
    settings = {"settings": {"temperature": 0.7, "seed": 7}}
    (tmp_path / "out.jsonl").write_text(json.dumps(settings) + '\n{"index": 0}\n')
    assert write()[0] == 2
    err = capsys.readouterr().err
    assert "was written with other settings (" in err and "temperature 0.7, now 0.8" in err and "seed" not in err
    (tmp_path / "mine.jsonl").write_text('{"a": 1}')
    assert main(["generate", "--prompt", "x", "--out", "y"]) == 2
    assert "--prompts and --out go together" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mine.jsonl is there already, and not from .* choose another --out"):
        read_finished(str(tmp_path / "mine.jsonl"), {})
    assert (tmp_path / "mine.jsonl").read_text() == '{"a": 1}'
    with pytest.raises(ValueError, match="there is no folder"):
        read_finished(str(tmp_path / "no-such-folder/out.jsonl"), {})


def test_a_file_without_a_text_may_change_its_settings(tmp_path):
    path = tmp_path / "out.jsonl"
    for content in ("", '{"sett', '{"settings": {"seed": 1}}\n', '{"settings": {"seed": 1}}\n{"ind'):
        path.write_text(content)
        assert read_finished(str(path), {"seed": 2}) == {}
    path.write_text('{"settings": {"seed": 2}}\n{"index": 4}\n{"index": 5, "sample": 1}\n{"ind')
    assert read_finished(str(path), {"seed": 2}) == {(4, 0): 0, (5, 1): 0}
    lines = [{"settings": {}}, {"index": 4, "turn": 0, "turns": 2}]
    lines += [{"index": 5, "turn": turn, "turns": 2, "finish": "failed"} for turn in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_finished(str(path), {}) == {(5, 0): 2}  # a conversation is whole with its last turn


def test_a_conversation_torn_between_its_turns_is_written_once(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = '{"settings": {}}\n{"index": 4}\n{"index": 5, "turn": 0, "turns": 2}\n{"index": 5, "turn": 1, "turns": 2}\n'
    torn = '{"index": 6, "turn": 0, "turns": 3}\n{"index": 6, "turn": 1, "turns": 3}\n{"ind'
    path.write_text(whole + torn)
    with HeadedLines(path, {}, is_last) as results:
        results.append({"index": 6})
    assert path.read_text() == whole + '{"index": 6}\n'
    path.write_text('{"settings": {}}\n{"index": 6, "turn": 0, "turns": 3}\n')
    HeadedLines(path, {"seed": 1}, is_last).__exit__(None, None, None)
    assert path.read_text() == '{"settings": {"seed": 1}}\n'


@pytest.mark.parametrize("batch", ["1", "3"])
def test_stop_strings_end_texts_just_there(write, expected, batch):
    stops = expected[0]["text"][5:8], expected[4]["text"][10:12]
    code, lines = write("--batch", batch, "--stop", stops[0], "--stop", stops[1])
    assert code == 0
    for line, whole in zip(lines, expected, strict=True):
        ends = [whole["text"].index(stop) for stop in stops if stop in whole["text"]]
        assert line["text"] == whole["text"][: min(ends, default=None)]
        kept = len(line["tokens"])
        assert line["tokens"] == whole["tokens"][:kept]
        assert len(line["log_probs"]) == kept
        assert line["finish"] == ("stop" if ends else whole["finish"])
    assert lines[0]["finish"] == lines[4]["finish"] == "stop"
    assert len(lines[0]["tokens"]) < 24


def test_prompts_that_cannot_be_decoded_fail_and_the_others_go_on(write, expected, tmp_path, capsys):
    assert write("--buckets", "8,16")[0] == 2
    assert (
        "prompts.jsonl, line 1: the prompt has 19 tokens, the widest of --buckets holds 16" in capsys.readouterr().err
    )
    faults = {
        '"' + "x" * 512 + '"': "the prompt has 512 tokens, this model takes at most 511",
        '{"tokens": [256]}': "token 256 is outside the vocabulary, 0 to 255",
        '{"tokens": [], "id": "mine"}': "the prompt is empty",
        '{"promt": "x", "id": 3}': "neither a string nor an object with",
        '"\\ud83d"': "half of a surrogate pair",
    }
    (tmp_path / "prompts.jsonl").write_text("\n".join(faults))
    assert write()[0] == 2  # there is nothing to do
    assert "line 1: the prompt has 512 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()

    (tmp_path / "prompts.jsonl").write_text("\n".join([json.dumps(PROMPTS[0]), *faults, json.dumps(PROMPTS[2])]))
    code, lines = write("--batch", "3")
    assert code == 1
    assert [(line["index"], line["sample"]) for line in lines] == [(i, j) for i in range(7) for j in range(2)]
    assert lines[:2] == expected[:2] and lines[-1]["tokens"]
    for line, (number, fault) in zip(lines[2:12:2], enumerate(faults.values(), start=2), strict=True):
        assert (line["finish"], line["text"], line["tokens"]) == ("failed", None, [])
        assert f"prompts.jsonl, line {number}: " in line["error"] and fault in line["error"]
    assert [line.get("id") for line in lines[2:12:2]] == [None, None, "mine", 3, None]
    err = capsys.readouterr().err
    assert err.count("error: ") == 6 and "10 of the texts failed; " in err
    assert write("--batch", "3") == (1, lines)  # nothing is written twice
    assert "10 of the texts failed; " in capsys.readouterr().err
    settings, *_ = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    broken = [json.dumps(line | {"finish": "failed"}) + "\n" for line in lines]  # as logits of NaN leave it
    (tmp_path / "out.jsonl").write_text(settings + "".join(broken))
    assert write("--batch", "3")[0] == 1
    assert "14 of the texts failed; " in capsys.readouterr().err


def echo(slots: int, broken: str = "") -> ScriptedBatch:
    """Every answer is the last letter of the prompt; it breaks with NaN after those that are `broken`."""
    return ScriptedBatch(lambda prompt, key: ([prompt[-1]], chr(prompt[-1]) in broken), slots)


def answered(batch: ScriptedBatch, *found: Prompt, longest_prompt: int = 99) -> list[Job]:
    rules = Rules(byte_tokenizer_once, False, Ends((), (), max_new_tokens=1), longest_prompt)
    keys = jax.random.split(jax.random.key(0), len(found))
    jobs = [Job(index, 0, prompt, keys[index]) for index, prompt in enumerate(found)]
    return sorted(run(batch, [answer_turns(job, rules) for job in jobs]), key=lambda job: job.index)


def test_turns_are_answered_one_after_the_other():
    """As MT-bench has it: a turn follows the model's own answers before it, and has a key of its own."""
    batch = echo(slots=2)
    found = [
        Prompt("f, line 1", list(b"Hi"), "Hi", ("ab", "c"), 3),
        Prompt("f, line 2", list(b"x"), "x"),
        Prompt("g", [121]),
    ]
    jobs = answered(batch, *found)
    assert [[text.text for text in job.texts] for job in jobs] == [["i", "b", "c"], ["x"], ["y"]]
    assert [[text.said for text in job.texts] for job in jobs] == [["Hi", "ab", "c"], ["x"], [None]]
    assert all(text.finish == "length" and text.cycles == 1 for job in jobs for text in job.texts)
    first = jax.random.split(jax.random.key(0), 3)[0]
    keys = [first, *(jax.random.fold_in(first, np.uint32(2**31 + turn)) for turn in (1, 2))]
    expected = zip(["Hi", "Hiiab", "Hiiabbc"], [jax.random.key_data(key).tolist() for key in keys], strict=True)
    asked = [(bytes(request.prompt).decode(), jax.random.key_data(request.key).tolist()) for request in batch.requests]
    assert [one for one in asked if one[0].startswith("Hi")] == list(expected)


def test_a_turn_that_fails_ends_its_conversation_alone():
    prompts = [
        Prompt("f, line 1", list(b"Hi"), "Hi", ("x" * 9, "c"), 10),
        Prompt("f, line 2", list(b"!"), "!", ("b",), 1),
        Prompt("f, line 3", fault="f, line 3: no"),
        Prompt("f, line 4", list(b"z"), "z"),
    ]
    jobs = answered(echo(slots=1, broken="!"), *prompts, longest_prompt=11)
    assert [[text.finish for text in job.texts] for job in jobs] == [
        ["length", "failed", "failed"],
        ["failed", "failed"],
        ["failed"],
        ["length"],
    ]
    assert [[text.error for text in job.texts] for job in jobs] == [
        [
            None,
            "f, line 1, turn 2: the conversation has 12 tokens, and there is room for 1 to 11 and an answer",
            "f, line 1, turn 3: the answer before it failed",
        ],
        ["the model's logits became NaN or infinite", "f, line 2, turn 2: the answer before it failed"],
        ["f, line 3: no"],
        [None],
    ]


def test_a_line_a_turn():
    job = answered(echo(slots=1), Prompt("f", list(b"Hi"), "Hi", ("b",), 1, {"question_id": 81}))[0]
    args = SimpleNamespace(num_samples=1, log_probs=False)
    assert batch._line(job, 1, args) == {
        **{"index": 0, "turn": 1, "turns": 2, "question_id": 81, "prompt": "b", "text": "b", "tokens": [98]},
        **{"finish": "length", "cycles": 1},
    }


def test_token_ids_need_no_tokenizer_and_end_with_the_context(golden, tmp_path, capsys):
    weights, out, path = golden / "weights", tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    pair = ["--target", str(weights / "t1_target"), "--draft", str(readable(weights / "t1_eagle3_dv96"))]
    path.write_text(json.dumps({"tokens": [65] * 505, "id": "a"}) + '\n"text"\n')
    options = ["--prompts", str(path), "--out", str(out), "--batch", "1", "--baseline", "--ignore-eos"]
    assert main(["generate", *pair, *options, "--max-new-tokens", "9" * 20]) == 1
    text, whole = sorted(map(json.loads, out.read_text().splitlines()[1:]), key=lambda line: -line["index"])
    assert (whole["id"], whole["text"], whole["finish"], len(whole["tokens"])) == ("a", None, "context", 7)
    assert "this model has no tokenizer" in text["error"]
    assert main(["chat", *pair]) == 2
    assert "this model has no tokenizer" in capsys.readouterr().err


def test_more_new_tokens_than_there_is_room_for(folder, capsys, monkeypatch):
    def stream(target, draft, tokens, lengths, key, *, max_new_tokens, capacity, **options):
        assert max_new_tokens == capacity == 512
        yield eagle_jax.Chunk(np.array([[65]]), np.array([1]), np.array([True]), np.array([False]))

    monkeypatch.setattr(api, "stream", stream)
    assert main(["generate", "--model", str(folder), "--prompt", "x", "--max-new-tokens", "9" * 20]) == 0
    assert "ended by the context" in capsys.readouterr().err


def test_samples_of_one_prompt_have_the_library_s_keys(folder, capsys, monkeypatch):
    keys = []

    def stream(target, draft, tokens, lengths, key, **options):
        keys.append(key)
        new = np.array([[65]])
        yield eagle_jax.Chunk(new, np.array([1]), np.array([False]), np.array([False]), np.array([[-0.25]]))
        yield eagle_jax.Chunk(new, np.array([1]), np.array([True]), np.array([len(keys) == 3]), np.array([[-0.75]]))

    monkeypatch.setattr(api, "stream", stream)
    assert main(["generate", "--model", str(folder), "--prompt", "x", *OPTIONS]) == 1
    captured = capsys.readouterr()
    assert captured.out == "AA\nAA\n"
    assert "sample 2" in captured.err and "mean log-probability -0.5000" in captured.err
    assert captured.err.count("the model's logits became NaN or infinite") == 1
    row = jax.random.fold_in(jax.random.key(7), 0)
    library = [jax.random.key_data(jax.random.fold_in(row, sample))[None] for sample in (0, 0, 1)]  # the first compiles
    np.testing.assert_array_equal([jax.random.key_data(key) for key in keys], library)


GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "min_p": 0, "eos_token_id": 1}


@pytest.fixture
def sampled_by(tmp_path):
    """The SamplingConfig of some options, with a model of this generation_config.json."""

    def config(options, content):
        if content is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(content))
        parser = argparse.ArgumentParser()
        add_sampling_arguments(parser)
        parser.set_defaults(model=None, target=str(tmp_path), revision=None)
        return sampling_config(parser.parse_args(options))

    return config


@pytest.mark.parametrize(
    ("options", "content", "expected"),
    [
        ([], GENERATION, {}),
        (["--sampling-from-model"], GENERATION, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
        (
            ["--sampling-from-model", "--top-p", "1", "--top-k", "7"],
            GENERATION,
            {"temperature": 0.6, "top_p": 1.0, "top_k": 7},
        ),
        (["--sampling-from-model", "--temperature", "0"], GENERATION, {"temperature": 0, "top_p": 0.9, "top_k": 50}),
        (["--sampling-from-model"], {"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            ["--sampling-from-model"],
            {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1},
            {"repetition_penalty": 1.1},
        ),
        (["--top-k", "99999999999"], None, {"top_k": 2**31 - 1}),
    ],
)
def test_sampling_of_the_model(sampled_by, options, content, expected, capsys):
    assert sampled_by(options, content) == SamplingConfig(**expected)
    err = capsys.readouterr().err
    if "--sampling-from-model" in options:
        assert err.startswith(f"sampling with --temperature {expected.get('temperature', 0):g}")
    else:
        assert err == ""


@pytest.mark.parametrize(
    ("options", "default"), [([], True), (["--temperature", "0"], False), (["--top-k", "3"], True)]
)
def test_who_chose_greedy_decoding(options, default):
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    args = parser.parse_args(options)
    sampling_config(args)
    assert (args.greedy_by_default, args.temperature) == (default, 0)


def test_a_model_that_asks_for_sampling_and_gets_none(tmp_path, monkeypatch):
    def line(**options):
        args = {
            "model": None,
            "target": str(tmp_path),
            "revision": None,
            "greedy_by_default": True,
            "sampling_from_model": False,
        }
        return model_asks(argparse.Namespace(**(args | options)))

    assert line() is None
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    assert line().startswith("greedy decoding; the model asks for --temperature 0.6 --top-k 50 --top-p 0.9")
    assert line(greedy_by_default=False) is line(model="other") is None

    def folder_of(source, hub, weights):
        assert (source, hub, weights) == ("owner/name", Hub("v2", local_files_only=True), False)
        return tmp_path

    monkeypatch.setattr(sampling_options, "folder_of", folder_of)
    assert line(target="owner/name", revision="v2").startswith("greedy decoding; the model asks for")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "generation_config.json is not there; give --temperature"),
        ({"do_sample": True, "temperature": "0.6"}, 'generation_config.json: temperature must be a number; got "0.6"'),
        ({"do_sample": True, "top_p": 0}, "generation_config.json: sampling.top_p must be above 0"),
    ],
)
def test_a_model_s_sampling_that_cannot_be_is_refused(sampled_by, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sampled_by(["--sampling-from-model"], content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "nan"], "sampling.temperature must be 0 (greedy) or a finite number above it; got nan"),
        (["--top-p", "0"], "sampling.top_p must be above 0, and at most 1 (off); got 0.0"),
        (["--top-k", "-1"], "sampling.top_k must be a whole number"),
        (["--min-p", "2"], "sampling.min_p must be 0 (off) to 1; got 2.0"),
        (["--repetition-penalty", "0"], "sampling.repetition_penalty must be a finite number above 0"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"], ["bench"]])
def test_bad_sampling_options_are_refused_before_anything_is_loaded(command, options, message, capsys):
    assert main([*command, "--model", "no-such-folder", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", "5"], "must be ID=VALUE, a token id and a finite number or -inf; got '5'"),
        (["--logit-bias", "5=inf"], "got '5=inf'"),
        (["--logit-bias=-5=1"], "got '-5=1'"),
        (["--seed", "-1"], "must be an integer, 0 to 4294967295; got '-1'"),
        (["--draft-window", "4"], "a window is first,recent"),
        (["--buckets", "64,x"], "must be positive integers, such as 64,256,1024; got '64,x'"),
        (["--prompts", "y"], "not allowed with argument"),
    ],
)
def test_options_that_argparse_refuses(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "x", *options])
    assert message in capsys.readouterr().err


pieces = st.lists(st.integers(1, 4), min_size=1, max_size=20)


@given(
    text=st.text(alphabet="abé🙂", max_size=14),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    sizes=pieces,
    other=pieces,
)
def test_a_text_ends_before_its_first_stop_string_however_it_comes(text, stops, sizes, other):
    def feed(sizes):
        detokenizer = Detokenizer(byte_tokenizer_once, stops)
        ids, given, index = list(text.encode()), "", 0
        while ids and not detokenizer.stopped:
            size = sizes[index % len(sizes)]
            given += detokenizer.add(ids[:size])
            assert text.startswith(given)  # nothing is taken back
            ids, index = ids[size:], index + 1
        given += detokenizer.finish()
        assert given == detokenizer.text
        return given, detokenizer.ids, detokenizer.stopped

    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    given, ids, stopped = feed(sizes)
    assert given == text[: min(found, default=len(text))]
    assert stopped == bool(found)
    assert bytes(ids).decode(errors="replace").startswith(given)
    assert (given, ids, stopped) == feed(other)


byte_tokenizer_once = byte_tokenizer()


def test_what_may_begin_a_stop_string_waits():
    detokenizer = Detokenizer(byte_tokenizer_once, ["stop", "top!"])
    assert [detokenizer.add([byte]) for byte in b"a st"] == ["a", " ", "", ""]
    assert [detokenizer.add([byte]) for byte in b"o s"] == ["", "sto ", ""]
    assert detokenizer.add(b"top! and more") == ""
    assert (detokenizer.text, bytes(detokenizer.ids), detokenizer.stopped) == ("a sto ", b"a sto stop", True)
    assert detokenizer.add(b"x") == detokenizer.finish() == ""
    with pytest.raises(ValueError, match="a stop string is empty"):
        Detokenizer(byte_tokenizer_once, [""])


def special_tokenizer():
    """Bytes, and two special tokens that no text shows."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|user|>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("stops", "text", "shown", "last"),
    [
        (["<|end|>"], "ABC<|end|>DEF", "ABC", "<|end|>"),
        (["<|end|>\nUser:"], "A<|end|>\nB<|end|>\nUser: C", "A\nB", ":"),  # the stop string spans a special token
        (["B<|end|><|user|>"], "AB<|end|>B<|end|><|user|>C", "AB", "<|user|>"),
        (["<|end|>", "D"], "AB<|user|>CD", "ABC", "D"),
        (["BC"], "AB<|end|>CD", "A", "C"),  # one that no stop string names does not show
        (["<|en", "d|>"], "AB<|end|>C", "ABC", "C"),  # a part of its name does not stop
        (["<|end|>x"], "A<|end|>B", "AB", "B"),
    ],
)
def test_stop_strings_may_hold_special_tokens(stops, text, shown, last):
    tokenizer = special_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for size in (1, 3, len(ids)):
        detokenizer = Detokenizer(tokenizer, stops)
        given = "".join(detokenizer.add(ids[start : start + size]) for start in range(0, len(ids), size))
        given += detokenizer.finish()
        assert given == detokenizer.text == shown
        assert detokenizer.stopped == (len(shown) < len(text.replace("<|end|>", "").replace("<|user|>", "")))
        assert tokenizer.convert_ids_to_tokens(detokenizer.ids[-1]) == last


def test_a_special_token_spelled_out_stops_too():
    tokenizer = special_tokenizer()
    detokenizer = Detokenizer(tokenizer, ["<|end|>"])
    assert detokenizer.add(list(b"ABC<|end|>DEF")) == "ABC"
    assert detokenizer.stopped


@pytest.mark.parametrize(
    ("ids", "stopped", "failed", "finish"),
    [
        ([1, 2], True, False, "stop"),
        ([1, 9], False, False, "stop"),
        ([1, 2], False, True, "failed"),
        ([1, 2, 3], False, False, "length"),
        ([1, 2], False, False, "context"),
    ],
)
def test_why_a_text_ended(ids, stopped, failed, finish):
    assert Ends(["x"], (9,), max_new_tokens=3).finish(ids, stopped, failed) == finish
