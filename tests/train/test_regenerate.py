"""Training sets whose answers the target writes: what is replaced, what stays, and runs that were killed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers import ByT5Tokenizer

import eagle_jax
from eagle_jax import Eagle3Draft, SamplingConfig
from eagle_jax.cli import main
from eagle_jax.convert import from_pretrained
from eagle_jax.train import fingerprint
from eagle_jax.train.data.records import DataError, read_records
from eagle_jax.train.data.regenerate import LINES_A_SLOT, Options, PromptSource, regenerate
from eagle_jax.train.run.save import save_head
from tests.scripted import ScriptedBatch
from tests.toy import draft_config, scaled
from tests.train.chat_templates import CHATML, LLAMA3, MISTRAL, PLAIN, REASONING, STRIPPING, byte_level, chat
from tests.train.models import VOCAB, write_target
from tests.train.test_answers import DROPS

END = "<|im_end|>"


class Scripted(ScriptedBatch):
    """A running batch whose texts (or token ids, or None for NaN) are a function of prompt and key."""

    def __init__(self, tokenizer: Any, slots: int = 2, script=None, end: str = END, die_at: int | None = None):
        self.tokenizer, self.end = tokenizer, tokenizer.convert_tokens_to_ids(end)
        script = script or (lambda prompt, key: f"new {len(prompt)} {key}")

        def answer(prompt, key):
            text = script(prompt, int(jax.random.bits(key)) % 1000)
            if isinstance(text, str):
                text = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ([], True) if text is None else ([*text, self.end], False)

        super().__init__(answer, slots, (self.end,), die_at)

    @property
    def prompts(self) -> list[str]:
        return [self.tokenizer.decode(request.prompt) for request in self.requests]


def made(
    tmp_path: Path,
    lines: list[Any],
    decoder: Scripted,
    overwrite=False,
    say=None,
    settings=None,
    lines_a_slot=LINES_A_SLOT,
    tokenizer=True,
    **options,
):
    """The records that `regenerate` makes of some lines, and its result."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    source = PromptSource(decoder.tokenizer if tokenizer else None, VOCAB, (decoder.end,))
    said: list[str] = [] if say is None else say
    options = Options(**{"max_length": 200, "max_new_tokens": 40} | options)
    args = [str(data)], out, decoder, source, options, settings or {}, said.append, overwrite
    result = regenerate(*args, lines_a_slot=lines_a_slot)
    return [json.loads(line) for line in out.read_text().splitlines()], result


def records(path: Path, tokenizer: Any):
    return list(read_records([str(path)], tokenizer, vocab_size=VOCAB, max_length=1000))


def test_every_answer_is_new_and_later_ones_see_it(tmp_path):
    decoder = Scripted(byte_level(CHATML))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    long = [*chat("Hi", "old one", "More", "old two", system="Be brief."), {"role": "user", "content": "Bye", "id": 7}]
    called = [chat("Call")[0], call, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "old three"}]
    shared = {
        "system": "Sys",
        "conversations": [{"from": "human", "value": "Ask"}, {"from": "gpt", "value": "old four"}],
    }
    lines = [{"messages": long}, {"messages": called, "tools": tools}, shared]
    out, failed = made(tmp_path, lines, decoder)
    assert failed == 0
    assert [line["source"] for line in out] == [f"{tmp_path / 'data.jsonl'}:{number}" for number in (1, 2, 3)]
    assert [line["finish"] for line in out] == [["stop", "stop"], ["stop"], ["stop"]]
    assert "tools" not in out[0] and out[1]["tools"] == tools
    first, second = (out[0]["messages"][index]["content"] for index in (2, 4))
    assert first.startswith("new ") and second.startswith("new ") and first != second
    changed = {0: {2: first, 4: second}, 1: {3: out[1]["messages"][3]["content"]}}
    for line, messages in ((0, long), (1, called)):
        expected = [
            {"role": "assistant", "content": changed[line][index]} if index in changed[line] else message
            for index, message in enumerate(messages)
        ]
        assert out[line]["messages"] == expected
    assert out[2]["messages"][:2] == [{"role": "system", "content": "Sys"}, {"role": "user", "content": "Ask"}]
    assert "old" not in json.dumps(out) and not any("old" in prompt for prompt in decoder.prompts)
    (later,) = (prompt for prompt in decoder.prompts if "More" in prompt)
    assert f"assistant\n{first}{END}\n<|im_start|>user\nMore{END}" in later
    # What a run learns is what was decoded, with its end.
    tokenizer = decoder.tokenizer
    record = records(tmp_path / "out.jsonl", tokenizer)[0]
    assert tokenizer.decode(record.tokens[record.loss_mask > 0]) == f"{first}{END}{second}{END}"


@pytest.mark.parametrize(
    ("template", "end", "text"),
    [(MISTRAL, "<|eos|>", " Hello there"), (LLAMA3, "<|eot|>", " Hello"), (CHATML, END, " Hello\n"), (PLAIN, END, "x")],
)
def test_a_template_writes_the_text_that_was_decoded(tmp_path, template, end, text):
    tokenizer = byte_level(template)
    decoder = Scripted(tokenizer, script=lambda prompt, key: text, end=end)
    ((line,), _) = made(tmp_path, [{"messages": chat("Ask", "old", "Again", "older")}], decoder)
    whole = tokenizer.apply_chat_template(line["messages"], tokenize=False)
    spoken = text.strip() if template == LLAMA3 else text  # it trims every content
    assert whole.count(spoken) == 2
    before = tokenizer.apply_chat_template(line["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(before + spoken)


def said(tokenizer: Any, record: Any) -> str:
    return tokenizer.decode(record.tokens[record.loss_mask > 0])


@pytest.mark.parametrize(
    ("template", "end", "together"), [(REASONING, "<|eos|>", False), (DROPS, END, False), (CHATML, END, True)]
)
def test_training_learns_exactly_the_tokens_that_were_decoded(tmp_path, template, end, together):
    """Also where the template leaves reasoning out of every answer: then each is a document, after what it was told."""
    tokenizer = byte_level(template)
    decoder = Scripted(tokenizer, script=lambda prompt, key: f"hm {key}\n</think>\n\nans {key}", end=end)
    messages = chat("one", "old", "two", "older", system="S")
    ((line,), _) = made(tmp_path, [{"messages": messages}], decoder)
    answers = [message["content"] for message in line["messages"] if message["role"] == "assistant"]
    assert [answer.startswith("hm ") for answer in answers] == [True, True]
    found = records(tmp_path / "out.jsonl", tokenizer)
    if together:
        assert [said(tokenizer, record) for record in found] == [answers[0] + end + answers[1] + end]
        assert line["tokens"] == found[0].tokens.tolist() and line["loss_mask"] == found[0].loss_mask.tolist()
    else:
        assert [said(tokenizer, record) for record in found] == [answer + end for answer in answers]
    for prompt, record in zip(decoder.prompts, found * 2 if together else found, strict=True):
        assert tokenizer.decode(record.tokens).startswith(prompt)


def test_tokens_that_differ_from_the_templates_are_learned(tmp_path):
    """A model may write a text in other tokens than a tokenizer does."""
    tokenizer = byte_level(CHATML)
    letters = [token for letter in "Hello" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    decoder = Scripted(tokenizer, script=lambda prompt, key: letters)
    ((line,), _) = made(tmp_path, [{"messages": chat("a", "b", "c", "d")}], decoder)
    assert line["messages"][1]["content"] == "Hello" and tokenizer("Hello")["input_ids"][1:] != letters
    first, second = records(tmp_path / "out.jsonl", tokenizer)
    assert first.tokens[first.loss_mask > 0].tolist() == [*letters, decoder.end]
    assert second.tokens[second.loss_mask > 0].tolist() == [*letters, decoder.end]
    other = byte_level(CHATML)
    other.add_tokens(["more"])
    with pytest.raises(DataError, match=r"out\.jsonl:1: other tokenizer: its tokens are those of another tokenizer"):
        records(tmp_path / "out.jsonl", other)
    # And they may be regenerated again: by messages, not by tokens.
    again = tmp_path / "again"
    again.mkdir()
    ((line,), _) = made(again, [line], Scripted(tokenizer))
    assert line["messages"][1]["content"].startswith("new")


def test_prompts_alone_are_turns_of_a_user(tmp_path):
    """With a chat template; a conversation that nobody answered gets its answer, too."""
    lines = [{"prompt": "Hello"}, {"messages": chat("Hello")}, {"prompt": "Hello", "completion": None}]
    out, _ = made(tmp_path, lines, Scripted(byte_level(CHATML), script=lambda prompt, key: "Hi"))
    for line in out:
        assert line["messages"] == chat("Hello", "Hi") and line["finish"] == ["stop"]
    tokenizer = byte_level()
    decoder = Scripted(tokenizer, script=lambda prompt, key: "Hi")
    out, _ = made(tmp_path, lines[:1], decoder, overwrite=True)
    assert decoder.prompts == ["<|bos|>Hello"] and tokenizer.decode(out[0]["tokens"]) == f"<|bos|>HelloHi{END}"
    for wrong, says in (({"prompt": ""}, "empty text"), ({"prompt": ["a"]}, "'prompt' must be a string")):
        for template in (CHATML, None):
            with pytest.raises(DataError, match=says):
                made(tmp_path, [wrong], Scripted(byte_level(template)), overwrite=True)


def test_answers_of_weight_0_stay(tmp_path):
    messages = chat("a", "an example", "b", "old")
    messages[1]["weight"] = 0
    ((line,), _) = made(tmp_path, [{"messages": messages}], Scripted(byte_level(CHATML)))
    assert line["messages"][:3] == messages[:3] and line["messages"][3]["content"].startswith("new")
    (record,) = records(tmp_path / "out.jsonl", byte_level(CHATML))
    assert said(byte_level(CHATML), record) == line["messages"][3]["content"] + END


def test_texts_and_tokens_keep_their_beginning_and_exact_ids(tmp_path):
    tokenizer = byte_level(CHATML)
    decoder = Scripted(tokenizer, slots=3)
    text = "The answer is 42, and more."
    lines = [
        {"text": text},
        {"prompt": "Hello world", "completion": " old"},
        {"tokens": [9, 10, 11, 12], "loss_mask": [0, 0, 1, 0]},
        {"tokens": list(range(20, 40))},
        {"text": "Hi"},
    ]
    out, _ = made(tmp_path, lines, decoder, prompt_tokens=5, max_new_tokens=6)
    prompts = [
        tokenizer(text)["input_ids"][:5],
        tokenizer("Hello world")["input_ids"],
        [9, 10],
        list(range(20, 25)),
        tokenizer("Hi")["input_ids"],
    ]
    assert len(out) == 5
    for line, prompt, record in zip(out, prompts, records(tmp_path / "out.jsonl", tokenizer), strict=True):
        new = line["tokens"][len(prompt) :]
        assert line["tokens"][: len(prompt)] == prompt and len(new) == 6
        assert tokenizer.decode(new).startswith("new")
        assert line["loss_mask"] == [0] * len(prompt) + [1] * 6 and line["finish"] == "length"
        assert record.tokens.tolist() == line["tokens"] and record.loss_mask.tolist() == line["loss_mask"]


def test_bad_lines_are_refused_before_any_is_decoded_or_left_out_by_name(tmp_path):
    lines = [{"text": "Hello"}, "{bad", {"tokens": [VOCAB]}, {"prompt": "x" * 300, "completion": "y"}, {"text": "Hi"}]
    decoder = Scripted(byte_level(CHATML))
    with pytest.raises(DataError, match=r"data\.jsonl:2: invalid JSON"):
        made(tmp_path, lines, decoder)
    assert decoder.steps == 0 and [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    said: list[str] = []
    out, failed = made(tmp_path, lines, decoder, on_error="skip", say=said, overwrite=True)
    assert [line["source"].rsplit(":")[-1] for line in out] == ["1", "5"] and failed == 0
    for number, kind in ((2, "invalid JSON"), (3, "token id out of range"), (4, "too long")):
        assert sum(f"left out: {tmp_path / 'data.jsonl'}:{number}: {kind}: " in line for line in said) == 1
    assert "2 records of 5 lines; 1 left out, invalid JSON; 1 left out, token" in said[-1]
    with pytest.raises(
        ValueError, match=r"none of 2 lines can be used: 1 invalid JSON, first .*data\.jsonl:1: .*; 1 too"
    ):
        made(tmp_path, [lines[1], lines[3]], decoder, on_error="skip", overwrite=True)
    assert [line["source"] for line in made(tmp_path, lines[:1] * 5, decoder, True, limit=3)[0]] == [
        f"{tmp_path / 'data.jsonl'}:{number}" for number in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("script", "why", "failing"),
    [
        (lambda prompt, key: "word " * 30, "too long", 0),
        (lambda prompt, key: " " if len(prompt) > 30 else "fine", "empty answer", 0),
        (lambda prompt, key: None if len(prompt) > 30 else "fine", "failed", 1),
    ],
)
def test_a_conversation_that_cannot_go_on_ends_before(tmp_path, script, why, failing):
    decoder = Scripted(byte_level(CHATML), script=script)
    messages = chat("Hi", "old", "M" * 20, "older", "And", "oldest", system="S")
    ((line, other), failed) = made(
        tmp_path, [{"messages": messages}, {"messages": messages[:3]}], decoder, max_length=90, max_new_tokens=200
    )
    assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant"]
    assert line["cut_short"] == why and len(line["finish"]) == 1 and "cut_short" not in other
    assert failed == failing


def test_lines_of_which_nothing_is_left_are_told(tmp_path):
    decoder = Scripted(byte_level(CHATML), script=lambda prompt, key: None if len(prompt) == 1 else "")
    said: list[str] = []
    out, failed = made(tmp_path, [{"tokens": [9]}, {"messages": chat("Hi", "old")}], decoder, say=said)
    assert (out, failed) == ([], 1)
    assert any("data.jsonl:1: failed" in line for line in said)
    assert any("data.jsonl:2: empty answer: the target says nothing" in line for line in said)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(DataError, match="every answer calls a tool"):
        made(tmp_path, [{"messages": [chat("Hi")[0], call]}], decoder, overwrite=True)


def many_lines() -> list[dict[str, Any]]:
    turns = [chat(*[f"turn {turn} of {index}" for turn in range(2 * (1 + index % 3))]) for index in range(23)]
    return [{"messages": turn} for turn in turns] + [{"tokens": [index + 9] * (1 + index % 5)} for index in range(20)]


def test_a_text_does_not_depend_on_the_batch(tmp_path):
    results = [
        made(tmp_path, many_lines(), Scripted(byte_level(CHATML), slots), overwrite=True)[0] for slots in (1, 3, 64)
    ]
    assert results[0] == results[1] == results[2]
    seeded = made(tmp_path, many_lines(), Scripted(byte_level(CHATML), 3), overwrite=True, seed=1)[0]
    assert seeded != results[0]


def test_a_run_that_was_killed_comes_to_the_same_bytes(tmp_path):
    lines, out = many_lines(), tmp_path / "out.jsonl"
    partial, note = (tmp_path / f"out.jsonl.{name}" for name in ("partial", "progress.json"))
    whole = Scripted(byte_level(CHATML))
    made(tmp_path, lines, whole)
    expected = out.read_bytes()
    assert not partial.exists() and not note.exists()
    out.unlink()
    for die_at in (whole.steps // 2, whole.steps // 3, 2):
        decoder = Scripted(byte_level(CHATML), die_at=die_at)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, lines, decoder, lines_a_slot=4)
        assert expected.startswith(partial.read_bytes()) and not out.exists()
        with open(partial, "ab") as file:
            file.write(b'{"messages": [{"role": "us')  # a line that was cut
    assert json.loads(note.read_text())["inputs"] >= 8
    last, said = Scripted(byte_level(CHATML)), []
    made(tmp_path, lines, last, say=said)
    assert out.read_bytes() == expected
    assert last.steps < whole.steps // 2
    assert any("going on after" in line for line in said)
    assert not partial.exists() and not note.exists()
    with pytest.raises(ValueError, match="is there already; to write it anew, give --overwrite"):
        made(tmp_path, lines, whole)


def test_lines_of_token_ids_need_no_tokenizer(tmp_path):
    decoder = Scripted(byte_level(CHATML))
    lines = [{"tokens": [9, 10, 11], "loss_mask": [0, 0, 1]}, {"text": "words"}]
    (line,), _ = made(tmp_path, lines, decoder, on_error="skip", tokenizer=False)
    assert line["tokens"][:2] == [9, 10] and line["loss_mask"][:3] == [0, 0, 1] and "vocabulary" not in line
    with pytest.raises(DataError, match="jsonl:2: no tokenizer: a line of text needs a tokenizer"):
        made(tmp_path, lines, decoder, overwrite=True, tokenizer=False)


def test_a_tokenizer_in_python_has_a_fingerprint_too():
    slow = ByT5Tokenizer()
    assert fingerprint.of_tokenizer(slow) == fingerprint.of_tokenizer(ByT5Tokenizer())
    slow.add_tokens(["<new>"])
    assert fingerprint.of_tokenizer(slow) != fingerprint.of_tokenizer(ByT5Tokenizer())


def test_ctrl_c_keeps_the_lines_that_are_done_and_says_how_to_go_on(tmp_path):
    """Not only whole windows: what is done in order."""
    lines = [{"tokens": [9 + index]} for index in range(12)]
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, lines, Scripted(byte_level(CHATML), slots=2, die_at=8), say=told)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()]
    assert 2 <= len(kept) < 12
    assert told[-1] == f"stopped: {len(kept)} of 12 lines are kept; the same command goes on from there"
    out, _ = made(tmp_path, lines, Scripted(byte_level(CHATML), slots=2), say=told)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, lines, Scripted(byte_level(CHATML), slots=2, die_at=8), say=told, overwrite=True)
    assert told[-1].endswith("; the same command without --overwrite goes on from there")
    assert out[: len(kept)] == kept and len(out) == 12
    assert f"going on after {len(kept)} of 12 lines" in told
    (tmp_path / "whole").mkdir()
    whole, _ = made(tmp_path / "whole", lines, Scripted(byte_level(CHATML), slots=2))
    assert [line["tokens"] for line in whole] == [line["tokens"] for line in out]


@pytest.mark.parametrize("change", ["settings", "data", "options", "template"])
def test_other_settings_are_refused(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, many_lines(), Scripted(byte_level(CHATML), die_at=60), settings={"target": "a"}, lines_a_slot=4)
    assert (tmp_path / "out.jsonl.partial").stat().st_size
    lines = many_lines()[1:] if change == "data" else many_lines()
    other = Scripted(byte_level(STRIPPING if change == "template" else CHATML))
    settings = {"target": "b" if change == "settings" else "a"}
    options = {"max_new_tokens": 41} if change == "options" else {}
    name = {"settings": "target", "data": "files", "options": "max_new_tokens", "template": "tokenizer"}[change]
    with pytest.raises(ValueError, match=rf"other settings or data \({name}\).*--overwrite"):
        made(tmp_path, lines, other, settings=settings, **options)
    assert len(made(tmp_path, lines, other, settings=settings, overwrite=True, **options)[0]) == len(lines)


def test_parts_that_are_damaged_or_strange_are_refused(tmp_path):
    decoder = Scripted(byte_level(CHATML), die_at=60)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, many_lines(), decoder, lines_a_slot=4)
    partial, note = (tmp_path / f"out.jsonl.{name}" for name in ("partial", "progress.json"))
    content = partial.read_bytes()
    partial.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="lost some of its"):
        made(tmp_path, many_lines(), decoder)
    note.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        made(tmp_path, many_lines(), decoder)
    note.unlink()
    with pytest.raises(ValueError, match=r"without out\.jsonl\.progress\.json"):
        made(tmp_path, many_lines(), decoder)
    assert partial.read_bytes() == content[:-9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target and a head for it."""
    folder = tmp_path_factory.mktemp("regenerate")
    write_target(folder / "target", byte_level(CHATML))
    target, _ = from_pretrained(folder / "target", None)
    config = draft_config(vocab_size=VOCAB, draft_vocab_size=VOCAB)
    save_head(scaled(Eagle3Draft(config, 3, jax.random.key(1)), 6.0), target, folder / "head", "float32")
    return folder


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ("{bad", (), r"data\.jsonl:1: invalid JSON"),
        ('{"prompt": "x"}\n{"tokens": [999]}', (), r"data\.jsonl:2: token id out of range: the prompt holds 999"),
        ("{bad", ("--on-error", "skip"), "none of 1 lines can be used: 1 invalid JSON"),
        ('{"prompt": "x"}', ("--stop-token", "999"), "--stop-token 999"),
        ('{"prompt": "x"}', ("--logit-bias", "999=1"), "--logit-bias 999"),
        ('{"prompt": "x"}', ("--chat-template", "none.jinja"), "none.jinja"),
        ('{"prompt": "x"}', ("--model", "x"), "either --model, or --target"),
        ('{"prompt": "x"}', (), "weights"),
    ],
)
def test_bad_input_is_found_before_the_weights_are_read(folder, tmp_path, capsys, data, options, says):
    """In a folder that has none."""
    shutil.copytree(folder / "target", tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "data.jsonl").write_text(data)
    files = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main(["train", "regenerate", "--target", str(tmp_path / "target"), *files, *options]) == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "target"]


@pytest.mark.parametrize("sampled", [False, True])
def test_the_command_writes_the_targets_own_text(folder, tmp_path, sampled, capsys):
    rng = np.random.default_rng(0)
    lines = [{"tokens": rng.integers(9, VOCAB, size).tolist()} for size in (4, 9, 30, 2, 17)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"messages": chat("Hi", "a", "b", "c")}])))

    def run(out: str, *options: str) -> list[dict]:
        files = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / out)]
        lengths = ["--prompt-tokens", "6", "--max-new-tokens", "12", "--max-length", "120", "--ignore-eos"]
        command = ["train", "regenerate", "--target", str(folder / "target"), *files, *lengths, *options]
        assert main(command) == 0
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    options = ["--temperature", "0.9", "--top-p", "0.95", "--seed", "3"] if sampled else []
    out = run("plain.jsonl", "--batch", "2", *options)
    assert "tok/s" in capsys.readouterr().err
    answers = [message["content"] for message in out[-1]["messages"] if message["role"] == "assistant"]
    assert len(answers) == 2 and not {"a", "c"} & set(answers)
    if not sampled:
        head = ["--draft", str(folder / "head"), "--tree", "chain:2", "--batch", "3"]
        assert run("drafted.jsonl", *head) == out
        model = ["--draft", str(folder / "target"), "--tree", "chain:2", "--batch", "3"]  # a whole model drafts
        assert run("drafted_by_model.jsonl", *model) == out
        again = ["--target", "x", "--data", "y", "--out", str(tmp_path / "plain.jsonl")]
        assert main(["train", "regenerate", *again]) == 2
        assert "is there already" in capsys.readouterr().err
        return
    target, _ = from_pretrained(folder / "target", None)
    tokens, lengths = eagle_jax.pad([line["tokens"][:6] for line in lines])
    fold = jax.random.fold_in
    keys = jax.numpy.stack([fold(fold(jax.random.key(3), index), 0) for index in range(len(lines))])
    sampling = SamplingConfig(temperature=0.9, top_p=0.95)
    expected = eagle_jax.generate(target, None, tokens, lengths, keys, sampling=sampling, max_new_tokens=12)
    for line, row, length in zip(out[:-1], np.asarray(expected.tokens), np.asarray(expected.lengths), strict=True):
        assert line["tokens"] == row[:length].tolist() and sum(line["loss_mask"]) == 12
