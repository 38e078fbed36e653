"""eagle-jax chat, called in process: one context and one tree, so that its program compiles once."""

from __future__ import annotations

import functools
import io
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import eagle_jax
from eagle_jax import TreeConfig, convert
from eagle_jax.cli import main
from eagle_jax.cli.chat import Conversation, Session, _lines
from eagle_jax.convert import tokenizing
from eagle_jax.serving import RunningBatch
from tests.test_cli import byte_tokenizer, converted_pair

CONTEXT = 128
OPTIONS = ["--tree", "3,2,5", "--max-new-tokens", "24", "--context", str(CONTEXT)]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FIRST, SECOND = "def __len__(self):", "    return self"


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_pair(golden, tmp_path_factory.mktemp("chat"))


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Runs a session that reads these lines; returns its stdout and stderr."""

    def session(*lines: str, options=(), code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "--model", str(folder), *OPTIONS, *options]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return session


@pytest.fixture(scope="module")
def continuation(folder):
    """The library's text after a text, by one program for all lengths."""
    target, draft = convert.load(folder)
    tokenizer = byte_tokenizer()

    def of(text: str) -> str:
        tokens, lengths = eagle_jax.pad([tokenizer(text)["input_ids"]], [CONTEXT])
        out = eagle_jax.generate(
            target, draft, tokens, lengths, tree=TreeConfig(3, 2, 5), max_new_tokens=24, stop_tokens=(129,)
        )
        return tokenizer.decode(np.asarray(out.tokens[0, lengths[0] : out.lengths[0]]).tolist())

    return functools.cache(of)


def reused(err: str) -> list[tuple[int, int]]:
    pattern = r"; (\d+) of the prompt's (\d+) tokens were in the cache"
    return [(int(kept), int(length)) for kept, length in re.findall(pattern, err)]


def test_turns_continue_the_text_and_reuse_the_cache(chat, continuation):
    first = continuation(FIRST)
    second = continuation(FIRST + first + SECOND)
    out, err = chat(FIRST, SECOND)
    assert out == f"{first}\n{second}\n"
    (none, length), (kept, longer) = reused(err)
    assert (none, length) == (0, len(FIRST))
    assert len(FIRST) <= kept < longer


def test_the_template_s_conversation(chat, continuation, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(tokenizing, "tokenizer", lambda folder: tokenizer)
    before = "system: be brief\nuser: hi\nassistant: "
    first = continuation(before)
    second = continuation(f"{before}{first}\nuser: more\nassistant: ")
    out, err = chat("hi", "", "more", "/exit", "never read", options=["--system", "be brief"])
    assert out == f"{first}\n{second}\n"
    assert reused(err)[1][0] >= len(before)


def test_reset_forgets_the_conversation(chat, continuation):
    out, err = chat(FIRST, "/reset", SECOND, "/help")
    assert out == f"{continuation(FIRST)}\n{continuation(SECOND)}\n"
    assert "forgotten" in err and "/exit" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat, continuation, monkeypatch):
    advance = RunningBatch.advance
    calls = []

    def interrupted(batch, cycles):
        calls.append(cycles)
        if len(calls) == 2:  # of the first answer
            signal.raise_signal(signal.SIGINT)
        return advance(batch, cycles)

    monkeypatch.setattr(RunningBatch, "advance", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    out, err = chat(FIRST, SECOND)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Stopped." in err
    whole = continuation(FIRST)
    beginnings = [whole[:end] for end in range(1, len(whole)) if out.startswith(whole[:end] + "\n")]
    assert out in [f"{said}\n{continuation(FIRST + said + SECOND)}\n" for said in beginnings]


def test_ctrl_c_at_the_prompt_tells_how_to_leave(monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, EOFError])

    def read(prompt):
        raise next(lines)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert list(_lines(Console(stderr=True))) == []
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err


def test_a_conversation_that_is_too_long_goes_on_without_the_turn(chat, continuation):
    out, err = chat("x" * CONTEXT, FIRST, code=1)
    assert out == continuation(FIRST) + "\n"
    assert f"would have {CONTEXT} tokens; its context takes 1 to {CONTEXT - 1}" in err and "/reset" in err


def test_a_line_that_is_not_utf_8_is_left_out(folder, continuation, capsys, monkeypatch):
    lines = b"caf\xe9\n" + FIRST.encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", "--model", str(folder), *OPTIONS, "--max-new-tokens", "9" * 20]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(continuation(FIRST))
    assert "error: this line: character 4 is not UTF-8" in captured.err
    assert "ended by the context, which is full; 0 of the prompt's" in captured.err


def test_a_failed_answer_says_so(chat, monkeypatch):
    advance = RunningBatch.advance

    def broken(batch, cycles):
        chunk = advance(batch, cycles)
        return eagle_jax.Chunk(chunk.tokens, chunk.counts, chunk.done | True, chunk.failed | True)

    monkeypatch.setattr(RunningBatch, "advance", broken)
    _, err = chat(FIRST, code=1)
    assert "NaN or infinite" in err


def test_a_stop_string_ends_the_answer(chat, continuation):
    whole = continuation(FIRST)
    stop = whole[9:12]
    out, _ = chat(FIRST, options=["--stop", stop])
    assert out == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--temperature", "-1"],
            "error: sampling.temperature must be 0 (greedy) or a finite number above it; got -1.0",
        ),
        (["--stop", ""], "error: --stop: a stop string is empty"),
        (["--system", "be brief"], "error: --system needs a chat template"),
        (["--context", "513"], "error: --context 513: this model takes 2 to 512 tokens"),
        (["--logit-bias", "256=1"], "error: --logit-bias 256=1: the vocabulary's ids are 0 to 255"),
    ],
)
def test_wrong_options(folder, options, message, capsys):
    assert main(["chat", "--model", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand"),
        ("{{ messages[9].content.x }}", "UndefinedError: "),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError: "),
    ],
)
def test_a_template_that_refuses_or_breaks_leaves_the_turn_out(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    conversation = Conversation(tokenizer, raw=False, system="x")
    with pytest.raises(ValueError, match=f"chat template refuses this conversation: {re.escape(message)}"):
        conversation.tokens_with("hi")
    said: list[str] = []
    notes = SimpleNamespace(print=lambda text, **style: said.append(text))
    session = Session(None, conversation, None, None, None, notes)
    session.answer("hi")
    assert session.failed == 1 and message in said[0] and said[0].endswith("This turn is left out.")
    assert conversation.messages == conversation.system
