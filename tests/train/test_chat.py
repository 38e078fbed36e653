"""Which tokens of a conversation are the assistant's: against the text they decode to, and refused where not sure."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_jax.train.data import rendering
from eagle_jax.train.data.chat import Fault, conversation_tokens
from tests.train import chat_templates as templates
from tests.train.chat_templates import byte_level, chat, word_pieces

HELLO = chat("Hello", "Hello world 😀", " how", "\n\nI am fine. ")
make = functools.lru_cache(maxsize=None)(byte_level)  # a tokenizer a template


def learned(tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The texts of the runs of learned tokens."""
    assert tokens.dtype == np.int32 and mask.dtype == np.uint8 and tokens.shape == mask.shape
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(tokens[start:end]) for start, end in edges]


def answers_of(tokenizer, messages, **options) -> list[str]:
    return learned(tokenizer, *conversation_tokens(tokenizer, messages, **options))


def fault_of(tokenizer, messages, **options) -> Fault:
    with pytest.raises(Fault) as raised:
        conversation_tokens(tokenizer, messages, **options)
    return raised.value


ENDS = {  # of a template: what it writes before and after an answer's text, that the model writes too
    "CHATML": ("", "<|im_end|>"),
    "LLAMA3": ("", "<|eot|>"),
    "MARKED": ("", "<|im_end|>"),
    "MISTRAL": (" ", "<|eos|>"),
    "PLAIN": ("", "\n"),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("tokenizer", [byte_level, word_pieces])
def test_learns_answers_with_their_end_marks(name, tokenizer):
    made = tokenizer(getattr(templates, name))
    before, after = ENDS[name]
    contents = ("Hello world 😀", "I am fine. Hello")
    messages = chat("Hello", contents[0], "how", contents[1])
    assert answers_of(made, messages) == [before + content + after for content in contents]


@pytest.mark.parametrize("name", ENDS)
def test_tokens_are_those_of_the_template(name):
    tokenizer = make(getattr(templates, name))
    messages = [*HELLO, {"role": "user", "content": "more"}]
    tokens, _ = conversation_tokens(tokenizer, messages)
    assert tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_first_token_stands_once():
    tokens, _ = conversation_tokens(make(templates.LLAMA3), HELLO)
    assert tokens[0] == 0 and np.count_nonzero(tokens == 0) == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MESSAGE = st.one_of(TEXT, st.sampled_from(["Hello", " Hello ", "\n", "\nHello\n\n", "assistant\nHello", "[INST"]))
ANSWER = MESSAGE.filter(str.strip)


@given(st.data(), st.sampled_from(["CHATML", "MARKED", "LLAMA3"]))
def test_any_contents(data, name):
    """Learned texts are the contents and their end marks, whatever the texts are; special tokens stand between."""
    answers = data.draw(st.lists(ANSWER, min_size=1, max_size=3))
    contents = [text for answer in answers for text in (data.draw(MESSAGE), answer)]
    if data.draw(st.booleans()):
        contents.append(data.draw(MESSAGE))  # a user's turn that nobody answers
    system = data.draw(st.none() | MESSAGE)
    end = ENDS[name][1]
    expected = [(text.strip() if name == "LLAMA3" else text) + end for text in answers]
    assert answers_of(make(getattr(templates, name)), chat(*contents, system=system)) == expected


@given(st.lists(ANSWER, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_any_contents_without_special_tokens(contents):
    """Either exactly the answers' texts are learned, or the record is refused."""
    for template in (templates.PLAIN, templates.SPACED):
        tokenizer = make(template)
        try:
            tokens, mask = conversation_tokens(tokenizer, chat(*contents))
        except Fault as fault:
            assert fault.kind == "mask unsure"
        else:
            assert learned(tokenizer, tokens, mask) == [f"{answer}\n" for answer in contents[1::2]]


def test_same_with_and_without_marks():
    marked, unmarked = (conversation_tokens(make(template), HELLO) for template in (templates.MARKED, PLAIN_CHATML))
    np.testing.assert_array_equal(marked, unmarked)


PLAIN_CHATML = templates.CHATML[templates.CHATML.index("{% for") :]  # without the system message


def test_marks_give_the_mask_of_transformers():
    """Where that is right: marks that end in a token of their own."""
    tokenizer = make(templates.MARKED)
    theirs = tokenizer.apply_chat_template(HELLO, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = conversation_tokens(tokenizer, HELLO)
    assert tokens.tolist() == theirs["input_ids"] and mask.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("content", ["Hello 😀", "Hello ", " Hello", "  Hello \n"])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_marks_without_end_mark(content, trim_offsets):
    """Characters of several tokens, and ones of none (white space, in trimmed offsets), at the edges of marks."""
    template = templates.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = byte_level(template, trim_offsets=trim_offsets)
    assert answers_of(tokenizer, chat("Hello", content, "how", content)) == [content, content]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_edge_of_a_mark_is_learned(trim_offsets):
    tokenizer = byte_level(templates.SPACED_MARKED, trim_offsets=trim_offsets)
    assert answers_of(tokenizer, chat("Hello", "Hello world")) == [" Hello world"]  # one token: " Hello"
    ends = templates.SPACED_MARKED.replace("{% endgeneration %}", "{% endgeneration %} Hello")
    tokenizer = byte_level(ends, trim_offsets=trim_offsets)
    assert answers_of(tokenizer, chat("Hello", "Hello worl")) == [" Hello worl"]
    joined = templates.SPACED_MARKED.replace("{% endgeneration %}", "{% endgeneration %}ld")
    assert answers_of(byte_level(joined, trim_offsets=trim_offsets), chat("Hello", "Hello wor")) == [" Hello world"]


def test_a_token_across_one_edge_of_a_mark():
    """The other edge is where it is, though trimmed offsets have no characters for white space there."""
    template = "{% for m in messages %}{{ m.role }}:<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    content = "{{ m.content }}<|im_end|>"
    marked = "{% if m.role == 'user' %}" + content + "{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
    ends = template.replace(content, marked + "ld<|im_end|>{% endif %}")
    messages = chat("Hello", "\n\n Hello wor")
    assert answers_of(byte_level(ends, trim_offsets=True), messages) == ["\n\n Hello world"]
    starts = template.replace("<|im_start|>", " ").replace(content, marked + "<|im_end|>{% endif %}")
    messages = chat("Hello", "Hello ")
    assert answers_of(byte_level(starts, trim_offsets=True), messages) == [" Hello "]


def test_special_tokens_of_a_template_with_marks():
    tokens, _ = conversation_tokens(make("{{ bos_token }}" + templates.MARKED), HELLO)
    assert tokens[0] == 0 and np.count_nonzero(tokens == 0) == 1


def test_a_token_across_the_edge_without_marks_is_refused():
    fault = fault_of(make(templates.SPACED), chat("Hello", "Hello"))
    assert fault.kind == "mask unsure" and "no token begins or ends" in str(fault) and "{% generation %}" in str(fault)


def test_a_prompt_that_answers_do_not_begin_with_is_refused():
    template = templates.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    fault = fault_of(make(template), HELLO)
    assert fault.kind == "mask unsure" and "message 2" in str(fault)


def test_no_generation_prompt():
    """Without one a header would be learned: only an answer that begins with its content is sure."""
    headless = templates.CHATML[: templates.CHATML.index("{% if add_generation_prompt")]
    fault = fault_of(make(headless), HELLO)
    assert fault.kind == "mask unsure" and "no generation prompt" in str(fault)
    calls = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
    called = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    assert "no generation prompt" in str(fault_of(make(headless), called))


def test_what_comes_before_an_answer_is_refused():
    template = "{% if messages | length == 1 %}{{ raise_exception('too short') }}{% endif %}" + templates.CHATML
    fault = fault_of(make(template), HELLO)
    assert fault.kind == "mask unsure" and "too short" in str(fault)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("m.role == 'assistant'", "m.role == 'user'", "'user', stands inside"),
        (
            "m.role == 'assistant'",
            "m.role == 'assistant' and loop.last",
            "message 2, of role 'assistant', stands outside",
        ),
        ("m.role == 'assistant'", "m.role != 'system'", "message 1, of role 'user', stands inside"),
    ],
)
def test_marks_in_the_wrong_place(old, new, says):
    fault = fault_of(make(templates.MARKED.replace(old, new)), HELLO)
    assert fault.kind == "mask unsure" and says in str(fault)


def test_marks_inside_a_macro():
    """There they count from the macro's own beginning."""
    macro = "{% macro say(m) %}<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    template = (
        macro
        + "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ say(m) }}{% endif %}{% endfor %}"
    )
    assert fault_of(make(template), HELLO).kind == "mask unsure"


def test_marks_that_a_content_empties():
    template = templates.MARKED.replace(
        "{{ m.content }}<|im_end|>{% end", "{{ m.content | replace('Hello', '') }}{% end"
    )
    fault = fault_of(make(template), chat("Hello", "Hello", "how", "fine"))
    assert fault.kind == "mask unsure" and "marks nothing of message 2" in str(fault)


def test_marks_are_checked_once_for_the_same_roles():
    tokenizer = make(templates.MARKED)
    rendering._check_marks.cache_clear()
    for content in ("Hello", "fine", "how"):
        conversation_tokens(tokenizer, chat(content, content))
    assert rendering._check_marks.cache_info().misses == 1
    conversation_tokens(tokenizer, chat("Hello", "Hello", system="how"))
    assert rendering._check_marks.cache_info().misses == 2


def test_white_space_after_the_end_mark():
    """An answer's own white space is learned, a template's after the last special token is not."""
    tokenizer = make(templates.CHATML)
    assert answers_of(tokenizer, chat("Hello", "Hello \n\n", "how", "fine\n")) == [
        "Hello \n\n<|im_end|>",
        "fine\n<|im_end|>",
    ]
    after = templates.CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>END\n{% endfor")
    assert answers_of(make(after), chat("Hello", "fine")) == ["fine<|im_end|>END\n"]


def test_white_space_after_an_added_token_that_is_not_special():
    tokenizer = byte_level(templates.PLAIN)
    tokenizer.add_tokens(["</think>"])
    assert answers_of(tokenizer, chat("Hello", "fine</think>")) == ["fine</think>\n"]


SHAREGPT_NAMES = [("system", "human", "gpt"), ("system", "user", "chatgpt"), ("developer", "human", "model")]


@pytest.mark.parametrize("names", SHAREGPT_NAMES)
def test_names_of_roles(names):
    tokenizer = make(templates.CHATML)
    shared = [{"from": name, "value": text} for name, text in zip(names, ("Be nice", "Hello", "fine"), strict=True)]
    expected = conversation_tokens(tokenizer, chat("Hello", "fine", system="Be nice"))
    np.testing.assert_array_equal(conversation_tokens(tokenizer, shared), expected)


def test_parts_of_text():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    tokenizer = make(templates.CHATML)
    made = conversation_tokens(tokenizer, [{"role": "user", "content": parts}, HELLO[1]])
    np.testing.assert_array_equal(made, conversation_tokens(tokenizer, HELLO[:2]))


USER, ASSISTANT, SYSTEM, TOOL = ({"role": role, "content": "x"} for role in ("user", "assistant", "system", "tool"))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([ASSISTANT], "message 1: 'assistant' comes first, where 'system' or 'user' must stand"),
        ([USER], "no message is the assistant's"),
        ([SYSTEM], "no message is the assistant's"),
        ([USER, USER, ASSISTANT], "message 2: 'user' follows 'user', where 'assistant' must stand"),
        ([USER, ASSISTANT, ASSISTANT], "message 3: 'assistant' follows 'assistant'"),
        ([USER, SYSTEM, ASSISTANT], "message 2: 'system' follows 'user'"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "message 2: 'system' follows 'system'"),
        ([SYSTEM, ASSISTANT], "message 2: 'assistant' follows 'system'"),
        ([TOOL, ASSISTANT], "message 1: 'tool' comes first"),
        ([USER, TOOL, ASSISTANT], "message 2: 'tool' follows 'user'"),
        ([USER, ASSISTANT, TOOL, USER], "message 4: 'user' follows 'tool'"),
        ([USER, {"role": "narrator", "content": "x"}], "message 2: the role is 'narrator'"),
        ([USER, {"role": ["user"], "content": "x"}], "message 2: the role is ['user']"),
        ([USER, {"content": "x"}], "message 2: the role is None"),
    ],
)
def test_wrong_roles(messages, says):
    fault = fault_of(make(templates.CHATML), messages)
    assert fault.kind == "wrong roles" and says in str(fault)


@pytest.mark.parametrize(
    ("messages", "kind", "says"),
    [
        ([], "empty conversation", "no messages"),
        ("Hello", "bad message", "no list"),
        ([USER, "Hello"], "bad message", "message 2 is no object"),
        ([USER, {"role": "assistant", "content": 3}], "bad message", "message 2: the content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT], "bad message", "message 1: the content"),
        ([{"role": "user"}, ASSISTANT], "bad message", "message 1: the content"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "bad message", "message 2: weights of answers are 0 (not learned) or 1"),
        ([USER, {**ASSISTANT, "weight": "1"}], "bad message", "got '1'"),
        ([USER, {**ASSISTANT, "weight": 0}], "nothing to learn", "weight 0"),
        ([USER, {**ASSISTANT, "tool_calls": "look"}], "bad message", 'message 2: "tool_calls" must be a list, or JSON'),
        ([USER, {"role": "assistant", "content": " \n"}], "empty answer", "message 2"),
        ([USER, {"role": "assistant", "content": None}], "empty answer", "message 2"),
    ],
)
def test_bad_messages(messages, kind, says):
    fault = fault_of(make(templates.CHATML), messages)
    assert fault.kind == kind and says in str(fault)


def test_an_empty_question_is_fine():
    assert answers_of(make(templates.CHATML), chat("", "fine")) == ["fine<|im_end|>"]


def test_a_template_may_refuse():
    fault = fault_of(make(templates.NO_SYSTEM), chat("Hello", "fine", system="Be nice"))
    assert fault.kind == "template refuses" and "no system role" in str(fault)
    assert fault_of(make("{{ messages[7].content.x }}"), HELLO).kind == "template refuses"
    assert fault_of(make("{{ 'a' + 1 }}"), HELLO).kind == "template refuses"


def test_a_system_message_in_the_user_turn():
    tokenizer = make(templates.MISTRAL)
    tokens, mask = conversation_tokens(tokenizer, chat("Hello", "fine", system="Be nice"))
    assert tokenizer.decode(tokens) == "<|bos|>[INST] Be nice\n\nHello [/INST] fine<|eos|>"
    assert learned(tokenizer, tokens, mask) == [" fine<|eos|>"]


def test_no_template_is_an_error_of_the_settings():
    with pytest.raises(ValueError, match="conversations need a chat template, give chat_template") as raised:
        conversation_tokens(make(None), HELLO)
    assert not isinstance(raised.value, Fault)
    with pytest.raises(ValueError, match="not valid Jinja: line 1") as raised:
        conversation_tokens(make("{% for %}"), HELLO)
    assert not isinstance(raised.value, Fault)


def test_template_in_place_of_the_tokenizers():
    expected = conversation_tokens(make(templates.LLAMA3), HELLO)
    given = conversation_tokens(make(templates.STRIPPING), HELLO, chat_template=templates.LLAMA3)
    np.testing.assert_array_equal(given, expected)


TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_call_id is defined %}answer to {{ m.tool_call_id }}{% endif %}"
    "{% if m.role == 'assistant' %}GENERATION{% if m.tool_calls %}"
    "{% for call in m.tool_calls %}call {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>END{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_tools(marks):
    tokenizer = make(TOOLS.replace("GENERATION", marks[0]).replace("END", marks[1]))
    calls = [{"type": "function", "function": {"name": "look", "arguments": json.dumps({"at": 1})}}]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "a", "tool_call_id": None},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "fine"},
    ]
    tokens, mask = conversation_tokens(tokenizer, messages, tools=[{"name": "look"}])
    assert "answer to" not in tokenizer.decode(tokens)
    assert tokenizer.decode(tokens).startswith('tools: [{"name": "look"}]\n<|im_start|>user\nHello')
    assert learned(tokenizer, tokens, mask) == ['call look {"at": 1}<|im_end|>', "fine<|im_end|>"]
