"""Reading JSONL: every format, every fault by file and line, refused or skipped, and the report."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_jax.train import fingerprint
from eagle_jax.train.data.chat import Kind, conversation_tokens
from eagle_jax.train.data.records import DataError, ReadReport, Record, read_records
from tests.train import chat_templates as templates
from tests.train.chat_templates import byte_level, chat, word_pieces

TOKENIZER = byte_level(templates.CHATML)
BOS, EOS = 0, 1
LIMITS = {"vocab_size": len(TOKENIZER), "max_length": 64}


def write(path: Path, *lines: object) -> Path:
    """A file of these lines: bytes and strings as they are, the rest as JSON."""
    encoded = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    content = b"".join(line + b"\n" for line in encoded)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _text(line: object) -> str:
    return line if isinstance(line, str) else json.dumps(line)


@pytest.fixture
def read(tmp_path):
    """Reads a file of these lines."""

    def of(*lines: object, tokenizer=TOKENIZER, **options) -> list[Record]:
        return list(read_records([write(tmp_path / "a.jsonl", *lines)], tokenizer, **LIMITS | options))

    return of


def pairs(records: list[Record]) -> list[tuple[list[int], list[int]]]:
    for record in records:
        assert record.tokens.dtype == np.int32 and record.loss_mask.dtype == np.uint8
        assert record.tokens.shape == record.loss_mask.shape
    return [(record.tokens.tolist(), record.loss_mask.tolist()) for record in records]


def plain(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_text(read):
    tokens = plain("Hello world")
    assert pairs(read({"text": "Hello world", "id": 7})) == [([BOS, *tokens, EOS], [1] * (len(tokens) + 2))]
    assert pairs(read({"text": "Hello world"}, add_end=False)) == [([BOS, *tokens], [1] * (len(tokens) + 1))]
    assert pairs(read({"text": "Hello world<|eos|>"})) == pairs(read({"text": "Hello world"}))


def test_text_of_a_tokenizer_without_end(read):
    tokenizer = byte_level(first=False)
    tokenizer.eos_token = None
    assert pairs(read({"text": "Hello"}, tokenizer=tokenizer)) == [(plain("Hello"), [1] * len(plain("Hello")))]


def test_tokens(read):
    assert pairs(read({"tokens": [3, 4, 5]})) == [([3, 4, 5], [1, 1, 1])]
    assert pairs(read({"tokens": [3, 4, 5], "loss_mask": [0, 1, 0]})) == [([3, 4, 5], [0, 1, 0])]
    assert pairs(read({"tokens": [3, 4]}, tokenizer=None, vocab_size=5, max_length=2)) == [([3, 4], [1, 1])]


def test_prompt_and_completion(read):
    before, after = [BOS, *plain("Hello")], plain(" world")
    expected = [([*before, *after, EOS], [0] * len(before) + [1] * (len(after) + 1))]
    assert pairs(read({"prompt": "Hello", "completion": " world"})) == expected
    assert pairs(read({"prompt": "Hello", "completion": " world"}, add_end=False))[0][0] == [*before, *after]


def test_prompt_and_completion_that_share_a_token(read):
    """The prompt's own tokens, as a decoder is given them, then the completion's."""
    assert plain("Hello") != plain("Hel") + plain("lo")
    before, after = [BOS, *plain("Hel")], plain("lo")
    expected = [([*before, *after, EOS], [0] * len(before) + [1] * (len(after) + 1))]
    assert pairs(read({"prompt": "Hel", "completion": "lo"})) == expected


def test_prompt_and_completion_of_word_pieces(read):
    """Together, so that the completion gets no space before it."""
    tokenizer = word_pieces()
    tokens, mask = pairs(read({"prompt": "Hello", "completion": " world"}, tokenizer=tokenizer))[0]
    assert tokens == [*tokenizer("Hello world")["input_ids"], EOS] and mask == [0, 1, 1]


def test_prompt_of_a_tokenizer_that_ends_texts(read):
    from tokenizers import processors

    tokenizer = byte_level()
    ending = processors.TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ending
    before, after = plain("Hello"), plain(" world")
    expected = [([*before, *after, EOS], [0] * len(before) + [1] * (len(after) + 1))]
    assert pairs(read({"prompt": "Hello", "completion": " world"}, tokenizer=tokenizer)) == expected
    assert pairs(read({"text": "Hello"}, tokenizer=tokenizer)) == [([*before, EOS], [1] * (len(before) + 1))]


def test_conversations(read):
    messages = chat("Hello", "fine", "how", "Hello", system="Be nice")
    shared = [{"from": message["role"], "value": message["content"]} for message in messages]
    tokens, mask = conversation_tokens(TOKENIZER, messages)
    expected = [(tokens.tolist(), mask.tolist())]
    assert pairs(read({"messages": messages, "prompt": "Hello"}, max_length=100)) == expected  # UltraChat has both
    assert pairs(read({"conversations": shared, "text": None}, max_length=100)) == expected
    assert pairs(read({"conversations": shared[1:], "system": "Be nice"}, max_length=100)) == expected
    template = templates.LLAMA3
    tokens, mask = conversation_tokens(TOKENIZER, messages, chat_template=template)
    found = read({"messages": messages}, {"conversations": shared}, chat_template=template)
    assert pairs(found) == [(tokens.tolist(), mask.tolist())] * 2


def test_tools(read):
    template = "{{ tools | tojson }}" + templates.CHATML
    shared = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "fine"}]
    for talk in ({"messages": chat("Hello", "fine")}, {"conversations": shared}):
        for tools in ([{"name": "look"}], '[{"name": "look"}]'):
            tokens = read(talk | {"tools": tools}, chat_template=template, max_length=100)[0].tokens
            assert TOKENIZER.decode(tokens).startswith('[{"name": "look"}]<|im_start|>')
    none = read({"messages": chat("Hello", "fine"), "tools": []}, chat_template=template, max_length=100)[0].tokens
    assert TOKENIZER.decode(none).startswith("null<|im_start|>")  # templates ask whether there are any, by `is none`


GOOD = {"tokens": [3, 4]}
VOCABULARY = fingerprint.of_vocabulary(TOKENIZER)
FAULTS: list[tuple[object, Kind, str]] = [
    (b'{"text": "\xff"}', "not UTF-8", "byte 11 of the line is 0xff"),
    ('{"text": "\\uD800"}', "not UTF-8", "surrogate"),
    ('{"text": "a"', "invalid JSON", "column 13"),
    ("[" * 100_000, "invalid JSON", "nested too deeply"),
    ('{"tokens": [' + "1" * 5000 + "]}", "invalid JSON", "digits"),
    ([1, 2], "unknown format", "this one is a list"),
    ({"content": "a"}, "unknown format", "has the keys 'content'"),
    ({}, "unknown format", "exactly one of text, prompt and completion, tokens, messages, conversations"),
    ({"text": "a", "tokens": [1]}, "unknown format", "holds 'text' and 'tokens'"),
    ({"prompt": "a"}, "unknown format", "has the keys 'prompt'"),
    ({"text": ["a"]}, "unknown format", "'text' must be a string, and is a list"),
    ({"prompt": [], "completion": "a"}, "unknown format", "'prompt' must be a string"),
    ({"text": ""}, "empty text", "'text' is empty"),
    ({"prompt": "a", "completion": ""}, "empty text", "'completion' is empty"),
    ({"tokens": "a"}, "bad tokens", "list of integers"),
    ({"tokens": [1, True]}, "bad tokens", "list of integers"),
    ({"tokens": [1, 2.0]}, "bad tokens", "list of integers"),
    ({"tokens": [1, 2], "loss_mask": [1]}, "bad loss mask", "1 entries for 2 tokens"),
    ({"tokens": [1, 2], "loss_mask": [1, 2]}, "bad loss mask", "0 and 1"),
    ({"tokens": [1, 2], "loss_mask": [1, True]}, "bad loss mask", "0 and 1"),
    ({"tokens": [1, 2], "loss_mask": [[1], [2]]}, "bad loss mask", "0 and 1"),
    ({"tokens": [1, 2], "loss_mask": "11"}, "bad loss mask", "0 and 1"),
    ({"messages": "a"}, "bad message", "no list"),
    ({"conversations": "a", "system": "b"}, "bad message", "no list"),
    ({"messages": chat("a", "b"), "tools": "c"}, "bad message", '"tools" must be a list'),
    ({"messages": []}, "empty conversation", "no messages"),
    ({"conversations": [], "system": ""}, "empty conversation", "no messages"),
    ({"messages": chat("a", "")}, "empty answer", "message 2"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "wrong roles", "message 1"),
    ({"messages": chat("a", "RAISE")}, "template refuses", "said no"),
    ({"messages": chat("UNSURE", "b")}, "mask unsure", "{% generation %}"),
    (
        {"messages": chat("a", "CUT it")},
        "answer changed",
        "message 2: the chat template leaves out or changes its content",
    ),
    (
        {"messages": [], "tokens": [3], "vocabulary": "x"},
        "other tokenizer",
        "another tokenizer (vocabulary x, this one's",
    ),
    ({"tokens": [3], "vocabulary": "x"}, "other tokenizer", "let this target regenerate it"),
    ({"messages": [], "tokens": [3]}, "unknown format", "holds 'tokens' and 'messages'"),
    ({"tokens": [[3], [4]], "loss_mask": [[1]], "vocabulary": VOCABULARY}, "bad loss mask", "1 lists for 2 of tokens"),
    ({"tokens": [3, "4"], "vocabulary": VOCABULARY}, "bad tokens", "list of integers"),
    ({"tokens": [999], "vocabulary": VOCABULARY}, "token id out of range", "token 1 is 999"),
    (
        {"data": [GOOD, GOOD]},
        "unknown format",
        "if the records are the list under 'data', write that list alone to a file",
    ),
    ({"text": float("nan")}, "invalid JSON", "NaN is no JSON"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": "look"}]},
        "bad message",
        '"tool_calls" must be',
    ),
    (
        {"messages": [*chat("a", "b")[:1], chat("a", "b")[1] | {"weight": 2}]},
        "bad message",
        "0 (not learned) or 1, got 2",
    ),
    (
        {"messages": [*chat("a", "b")[:1], chat("a", "b")[1] | {"weight": 0}]},
        "nothing to learn",
        "every answer has weight 0",
    ),
    ({"tokens": [3, len(TOKENIZER), -1]}, "token id out of range", f"token 2 is {len(TOKENIZER)}; ids are 0 to"),
    ({"tokens": [3, 4, -1]}, "token id out of range", "token 3 is -1"),
    ({"tokens": [2**80]}, "token id out of range", f"token 1 is {2**80}"),
    ({"tokens": []}, "nothing to learn", "none of its 0 tokens"),
    ({"tokens": [1, 2], "loss_mask": [0, 0]}, "nothing to learn", "none of its 2 tokens"),
    ({"tokens": [3] * 65}, "too long", "65 tokens, and at most 64"),
    ({"text": "Hello" * 100}, "too long", "at most 64"),
]
# Refuses and changes its mind on command, to reach every kind of fault.
TEMPLATE = (
    "{% if messages[-1].content == 'RAISE' %}{{ raise_exception('said no') }}{% endif %}"
    "{% if messages | length == 1 and messages[0].content == 'UNSURE' %}{{ raise_exception('too short') }}{% endif %}"
    + templates.CHATML.replace("{{ m.content }}", "{{ m.content | replace('CUT', '') }}")
)


def test_every_kind_of_fault_is_tried():
    elsewhere = {"damaged file", "tokenizer refuses", "failed"}  # below, and in test_regenerate.py
    assert {kind for _, kind, _ in FAULTS} | elsewhere == set(get_args(Kind))


@pytest.mark.parametrize(("line", "kind", "says"), FAULTS)
def test_refuses(tmp_path, line, kind, says):
    path = write(tmp_path / "a.jsonl", GOOD, "", line, GOOD)
    report = ReadReport()
    records = read_records([path], TOKENIZER, **LIMITS, chat_template=TEMPLATE, report=report)
    next(records)
    with pytest.raises(DataError) as raised:
        next(records)
    message = str(raised.value)
    assert message.startswith(f"{path}:3: {kind}: ") and says in message
    assert (raised.value.path, raised.value.line, raised.value.kind) == (str(path), 3, kind)
    assert report.faults == {kind: 1} and report.messages == {kind: [message]}


def test_skips(tmp_path):
    path = write(tmp_path / "a.jsonl", *(line for fault in FAULTS for line in (fault[0], GOOD)))
    report = ReadReport()
    records = read_records([path], TOKENIZER, **LIMITS, on_error="skip", chat_template=TEMPLATE, report=report)
    assert pairs(list(records)) == [([3, 4], [1, 1])] * len(FAULTS)
    kinds = [kind for _, kind, _ in FAULTS]
    assert report.faults == {kind: kinds.count(kind) for kind in kinds}
    assert report.lines == 2 * len(FAULTS) and report.records == len(FAULTS)
    for number, (_, kind, says) in enumerate(FAULTS):
        start = f"{path}:{2 * number + 1}: {kind}: "
        told = [message for message in report.messages[kind] if message.startswith(start)]
        assert told or kinds[:number].count(kind) >= 3  # the first three of a kind are kept
        assert all(says in message for message in told)
    assert all(len(messages) <= 3 for messages in report.messages.values())


def test_decoded_tokens_are_learned_as_they_are(read):
    """Not the messages beside them, which a template may write otherwise; several lists are several documents."""
    talk = {"messages": chat("Hello", "fine"), "vocabulary": VOCABULARY}
    assert pairs(read(talk | {"tokens": [3, 4, 5], "loss_mask": [0, 1, 1]})) == [([3, 4, 5], [0, 1, 1])]
    assert pairs(read({"tokens": [3, 4], "vocabulary": VOCABULARY})) == [([3, 4], [1, 1])]
    report = ReadReport()
    several = talk | {"tokens": [[3, 4, 5], [6] * 65, [7, 8]], "loss_mask": [[0, 1, 1], [1] * 65, [0, 1]]}
    assert pairs(read(several, on_error="skip", report=report)) == [([3, 4, 5], [0, 1, 1]), ([7, 8], [0, 1])]
    assert report.unrolled == 1 and report.faults == {"too long": 1}
    assert "1 conversation split by answers, as the chat template changes earlier ones" in report.summary()


def test_a_conversation_whose_template_changes_earlier_answers(read):
    report = ReadReport()
    talk = {"messages": chat("a", "<think>b</think>c", "d", "<think>e</think>f")}
    records = read(talk, tokenizer=byte_level(templates.STRIPPING), max_length=100, report=report)
    said = [TOKENIZER.decode(record.tokens[record.loss_mask > 0]) for record in records]
    assert said == ["<think>b</think>c<|im_end|>", "<think>e</think>f<|im_end|>"] and report.unrolled == 1
    report = ReadReport()  # and an answer that cannot be learned is one fault
    talk, tokenizer = {"messages": chat("a", "b", "c", "d</think>e")}, byte_level(templates.REASONING)
    with pytest.raises(DataError, match=r":1: mask unsure: .*message 2"):
        read(talk, tokenizer=tokenizer)
    (record,) = read(talk, tokenizer=tokenizer, on_error="skip", report=report)
    assert TOKENIZER.decode(record.tokens[record.loss_mask > 0]) == "d</think>e<|eos|>"
    assert "; 1 line, or single answers of conversations, not used\n  1 mask unsure, first" in report.summary()


@pytest.mark.parametrize(
    ("predicted", "left"),
    [(slice(None), [0, 1, 2, 3]), (slice(1, None), [1, 2, 3]), (slice(2, None), [2]), (slice(None, -1), [0, 1, 2])],
)
def test_documents_in_which_no_loss_sees_a_token_are_counted_and_left_out(read, predicted, left):
    lines = [
        {"tokens": [10, 9], "loss_mask": [1, 0]},
        {"tokens": [11, 9, 9], "loss_mask": [0, 1, 0]},
        {"tokens": [12, 9, 9, 9], "loss_mask": [0, 0, 1, 1]},
        {"tokens": [13, 9], "loss_mask": [0, 1]},
    ]
    report = ReadReport()
    records = read(*lines, predicted=predicted, report=report)
    assert [record.tokens[0] - 10 for record in records] == left
    assert report.unseen == 4 - len(left)
    said = f"{4 - len(left)} document{'s' if len(left) < 3 else ''} left out, as no loss sees a token to learn in them"
    assert (said in report.summary()) == bool(report.unseen)


def test_one_json_array_is_a_file_of_records(tmp_path):
    """ShareGPT's own form; a fault has its place in the file, and the others are read."""
    talk = {"id": "x", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "fine"}]}
    path = tmp_path / "sharegpt.json"
    for indent, place in ((None, ":1, entry 2"), (1, ":15, entry 2")):
        path.write_text(json.dumps([talk, {"id": "y"}, talk], indent=indent))
        report = ReadReport()
        records = list(read_records([path], TOKENIZER, **LIMITS, on_error="skip", report=report))
        assert len(records) == 2 and report.lines == 3
        assert report.summary().startswith("2 records of 3 entries in 1 file: ")
        assert "; 1 entry not used\n" in report.summary()
        assert report.messages["unknown format"][0].startswith(f"{path}{place}: unknown format: ")


def test_ids_of_a_larger_tokenizer(read):
    with pytest.raises(DataError, match=r"a\.jsonl:1: token id out of range"):
        read({"text": "Hello world"}, vocab_size=30)
    with pytest.raises(DataError, match=r"a\.jsonl:1: token id out of range"):
        read({"messages": chat("Hello", "fine")}, vocab_size=30)


def test_files_in_order(tmp_path):
    lines = [{"tokens": [number]} for number in range(5)]
    marked = b"\xef\xbb\xbf" + json.dumps(lines[0]).encode() + b"\r"
    first = write(tmp_path / "a.jsonl", marked, "", " \t", lines[1])
    second = write(tmp_path / "b.jsonl.gz", lines[2], lines[3])
    third = tmp_path / "c.jsonl"
    third.write_text(json.dumps(lines[4]))  # no newline at the end
    empty = write(tmp_path / "d.jsonl")
    report = ReadReport()
    records = read_records([first, str(second), third, empty], None, **LIMITS, report=report)
    assert [record.tokens.tolist() for record in records] == [[0], [1], [2], [3], [4]]
    assert (report.files, report.lines, report.records) == (4, 5, 5)
    assert [record.tokens.tolist() for record in read_records(str(third), None, **LIMITS)] == [[4]]


def test_fault_in_gz(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", GOOD, "{")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2: invalid JSON"):
        list(read_records([path], None, **LIMITS))


@pytest.mark.parametrize("damage", ["cut", "changed", "packed", "other"])
def test_damaged_gz(tmp_path, damage):
    path = write(tmp_path / "a.jsonl.gz", *[{"tokens": [number % 300] * (number % 7 + 1)} for number in range(3000)])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "changed":
        content[-8] ^= 255  # of the checksum
    elif damage == "packed":
        content[10:20] = b"\xff" * 10  # just after the header
    else:
        content[:] = b'{"tokens": [1]}\n'
    path.write_bytes(content)
    after = write(tmp_path / "b.jsonl", GOOD)
    line = {"cut": r"\d+", "changed": 3001, "packed": 1, "other": 1}[damage]
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz:{line}: damaged file"):
        list(read_records([path, after], None, **LIMITS))
    report = ReadReport()
    records = list(read_records([path, after], None, **LIMITS, on_error="skip", report=report))
    assert records[-1].tokens.tolist() == [3, 4] and report.faults["damaged file"] == 1


def test_too_long(read):
    tokens = list(range(10))
    line = {"tokens": tokens, "loss_mask": [1, 1, 0, 0, 0, 0, 0, 0, 1, 0]}
    report = ReadReport()
    cut = read(GOOD, line, max_length=4, too_long="truncate", report=report)
    assert pairs(cut) == [([3, 4], [1, 1]), ([0, 1, 2, 3], [1, 1, 0, 0])]
    assert (report.truncated, report.split, report.records, report.faults.total()) == (1, 0, 2, 0)
    report = ReadReport()
    parts = read(GOOD, line, max_length=4, too_long="split", report=report)
    assert pairs(parts) == [([3, 4], [1, 1]), ([0, 1, 2, 3], [1, 1, 0, 0]), ([8, 9], [1, 0])]
    assert (report.truncated, report.split, report.left_out, report.records) == (0, 1, 1, 3)
    assert (report.tokens, report.learned) == (8, 5)
    assert pairs(read(line, max_length=10)) == [(tokens, line["loss_mask"])]


def test_too_long_has_its_own_setting(read):
    bad, long = "{", {"tokens": [1] * 65}
    with pytest.raises(DataError, match=":2: too long"):
        read(bad, long, on_error="skip", too_long="refuse")
    with pytest.raises(DataError, match=":2: invalid JSON"):
        read(long, bad, too_long="skip")
    assert pairs(read(bad, long, GOOD, on_error="skip")) == [([3, 4], [1, 1])]


def test_nothing_to_learn_in_what_is_kept(read):
    line = {"tokens": [1, 2, 3], "loss_mask": [0, 0, 1]}
    with pytest.raises(DataError, match=":1: nothing to learn: none of its first 2 tokens"):
        read(line, max_length=2, too_long="truncate")
    assert pairs(read(line, max_length=2, too_long="split")) == [([3], [1])]


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 12))
def test_parts_join_to_the_whole(tmp_path_factory, mask, max_length):
    if not any(mask):
        return
    path = write(tmp_path_factory.mktemp("split") / "a.jsonl", {"tokens": list(range(len(mask))), "loss_mask": mask})
    report = ReadReport()
    records = pairs(
        list(read_records([path], None, vocab_size=30, max_length=max_length, too_long="split", report=report))
    )
    assert all(len(tokens) <= max_length and any(part) for tokens, part in records)
    seen = {token: bit for tokens, part in records for token, bit in zip(tokens, part, strict=True)}
    assert sum(len(tokens) for tokens, _ in records) == len(seen)  # none twice
    assert all(mask[token] == bit for token, bit in seen.items())
    assert not any(bit for token, bit in enumerate(mask) if token not in seen)
    assert report.left_out == (-(-len(mask) // max_length) - len(records) if len(mask) > max_length else 0)


@given(st.lists(st.binary(max_size=40) | st.text(max_size=40).map(str.encode), max_size=6))
def test_any_bytes(tmp_path_factory, lines):
    """Every line that is not blank gives a record or is counted."""
    path = tmp_path_factory.mktemp("bytes") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = ReadReport()
    records = list(read_records([path], TOKENIZER, **LIMITS, on_error="skip", report=report))
    assert len(records) + report.faults.total() == report.lines


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)
KEYS = ["text", "tokens", "loss_mask", "prompt", "completion", "messages", "conversations", "system", "tools"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_any_values(tmp_path_factory, entry):
    path = write(tmp_path_factory.mktemp("values") / "a.jsonl", entry)
    report = ReadReport()
    records = list(read_records([path], TOKENIZER, **LIMITS, on_error="skip", report=report))
    assert len(records) + report.faults.total() == 1


def test_summary(read):
    report = ReadReport()
    long = {"tokens": [1] * 65, "loss_mask": [1] + [0] * 64}
    read(GOOD, long, "{", "[", {"text": ""}, on_error="skip", too_long="split", report=report)
    first, *faults = report.summary().split("\n")
    assert first == (
        "2 records of 5 lines in 1 file: 66 tokens, 3 to learn; 1 line split (1 part without anything to learn); "
        "3 lines not used"
    )
    assert faults[0].startswith("  2 invalid JSON, first ") and "a.jsonl:3: invalid JSON" in faults[0]
    assert faults[1].startswith("  1 empty text, first ") and "a.jsonl:5: empty text" in faults[1]
    report = ReadReport()
    read({"tokens": [1] * 65}, too_long="truncate", report=report)
    assert report.summary() == "1 record of 1 line in 1 file: 64 tokens, 64 to learn; 1 line truncated"


def test_summary_of_several_files_and_of_nothing(tmp_path):
    """Every file with faults is named; where no record is left, further examples are shown."""
    good, bad, worse = (
        write(tmp_path / f"{name}.jsonl", *lines) for name, lines in (("a", [GOOD]), ("b", "{[{"), ("c", "["))
    )
    for files, told in (([good, bad, worse], 1), ([bad, worse], 3)):
        report = ReadReport()
        list(read_records(files, TOKENIZER, **LIMITS, on_error="skip", report=report))
        first, *lines = report.summary().split("\n")
        assert first.endswith("; 4 lines not used")
        assert lines[:2] == [f"  {bad}: 3 lines not used", f"  {worse}: 1 line not used"]
        assert lines[2].startswith(f"  4 invalid JSON, first {bad}:1: invalid JSON: ") and len(lines) == 2 + told


def test_settings_are_checked_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    for wrong in ({"on_error": "ignore"}, {"too_long": "cut"}, {"vocab_size": 0}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read_records([path], TOKENIZER, **LIMITS | wrong)
    for kind in (
        {"text": "a"},
        {"messages": chat("a", "b")},
        {"conversations": []},
        {"prompt": "a", "completion": "b"},
    ):
        write(path, kind)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            next(read_records([path], None, **LIMITS, on_error="skip"))
    write(path, {"messages": chat("a", "b")})
    with pytest.raises(ValueError, match="chat_template"):
        next(read_records([path], byte_level(), **LIMITS, on_error="skip"))
    with pytest.raises(FileNotFoundError):
        next(read_records([tmp_path / "b.jsonl"], None, **LIMITS))


def test_says_nothing_of_the_tokenizers_own_limit(read, caplog):
    tokenizer = byte_level(templates.CHATML)
    tokenizer.model_max_length = 2
    read({"text": "Hello world"}, {"messages": chat("Hello", "fine")}, tokenizer=tokenizer)
    read({"prompt": "Hello world", "completion": "Hello world"}, tokenizer=tokenizer)
    assert not caplog.records


def test_a_text_that_the_tokenizer_breaks_on_is_a_fault(read):
    class Broken:
        eos_token_id = None

        def __call__(self, text, **options):
            raise Exception("WordPiece error: Missing [UNK] token")

    report = ReadReport()
    lines = {"text": "a"}, GOOD, {"prompt": "a", "completion": "b"}
    assert pairs(read(*lines, tokenizer=Broken(), on_error="skip", report=report)) == [([3, 4], [1, 1])]
    assert report.faults == {"tokenizer refuses": 2}
    assert "a.jsonl:1: tokenizer refuses: the model's tokenizer refuses this text: Exception: WordPiece" in str(
        report.messages
    )
