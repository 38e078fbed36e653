"""An answer is learned whole (its content, its reasoning, its tool calls), or its conversation is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_jax.files.jsonl import Fault
from eagle_jax.train.data.chat import conversation_documents
from tests.train import chat_templates as templates
from tests.train.chat_templates import chat
from tests.train.test_chat import TOOLS, answers_of, fault_of, learned, make

LONG = "<think>\nwhy\n</think>\n\nans"
DROPS = templates.CHATML.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
)
OPENS = templates.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # answers stay whole
REWRITES = templates.CHATML.replace(  # as Qwen 3: reasoning and the rest are trimmed and joined anew
    "{{ m.content }}",
    "{% set c = m.content %}{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = '<think>\n' + r + '\n</think>\n\n' + c.split('</think>')[-1].strip() %}{% endif %}{{ c }}",
)
LEFT_OUT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
    "{% if add_generation_prompt or messages[loop.index] %}A{% endif %}{% endif %}{% endfor %}"
)
READS = templates.CHATML.replace(
    "{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
)


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (templates.REASONING, "why\n</think>\n\nans", "why\n</think>\n\nans<|eos|>"),
        (templates.REASONING, LONG, "why\n</think>\n\nans<|eos|>"),
        (templates.REASONING, "<think>why</think>ans", "why</think>ans<|eos|>"),
        (templates.REASONING, "why\n</think>", "why\n</think><|eos|>"),
        (templates.REASONING, "why</think>ans \n", "why</think>ans \n<|eos|>"),
        (DROPS, "why</think>ans", "why</think>ans<|im_end|>"),
        (DROPS, LONG, LONG + "<|im_end|>"),
        (DROPS, "[THINK]why[/THINK]ans", "[THINK]why[/THINK]ans<|im_end|>"),
        (DROPS.replace("m.content.split", "m.content.strip().split"), "why</think>ans \n", "why</think>ans<|im_end|>"),
        (OPENS, LONG, "why\n</think>\n\nans<|im_end|>"),
        (OPENS, "why</think>ans", "why</think>ans<|im_end|>"),
        (OPENS.replace("<think>\n", "<think>\n\n</think>\n\n"), "ans", "ans<|im_end|>"),
        (REWRITES, "<think>why</think>ans", LONG + "<|im_end|>"),
        (templates.LLAMA3, " \nans ", "ans<|eot|>"),
        (templates.STRIPPING, LONG, LONG + "<|im_end|>"),
    ],
)
def test_reasoning_is_learned_with_its_answer(template, answer, expected):
    assert answers_of(make(template), chat("q", answer)) == [expected]
    # And what stands before it is the generation prompt, after which the model wrote it.
    tokenizer = make(template)
    ((tokens, mask),) = conversation_documents(tokenizer, chat("q", answer))
    prompt = tokenizer.apply_chat_template(chat("q"), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokens[: list(mask).index(1)]) == prompt


@pytest.mark.parametrize(
    ("template", "answer", "kind", "says"),
    [
        (templates.REASONING, "ans", "mask unsure", "begins reasoning, <think>, which message 2 does not end"),
        (OPENS, "ans", "mask unsure", "begins reasoning, <think>, which message 2 does not end"),
        (OPENS.replace("<think>\n", "Sure, "), "ans", "mask unsure", "message 2"),
        (
            templates.CHATML.replace("{{ m.content }}", "{{ m.content[:5] }}"),
            "a long answer",
            "answer changed",
            "its content",
        ),
        (
            templates.CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"),
            "ans",
            "answer changed",
            "its content",
        ),
        (
            templates.CHATML.replace("{{ m.content }}", "{{ m.content.split()[0] }}"),
            "a b",
            "answer changed",
            "its content",
        ),
        (LEFT_OUT, "ans", "answer changed", "its content"),
        (
            templates.MARKED.replace("{% generation %}{{ m.content }}", "{% generation %}{{ m.content[:5] }}"),
            "a long answer",
            "mask unsure",
            "stands outside",
        ),
        (
            templates.MARKED.replace(
                "{{ m.content }}<|im_end|>{% end", "{{ m.content.split('</think>')[-1] }}<|im_end|>{% end"
            ),
            LONG,
            "answer changed",
            "message 2: the chat template leaves out or changes its content; give one that writes all of it, or let",
        ),
    ],
)
def test_answers_that_a_template_changes_are_refused(template, answer, kind, says):
    fault = fault_of(make(template), chat("q", answer))
    assert fault.kind == kind and says in str(fault)


PART = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["</think>", "<think>", " a ", "\n"]
)
SAID = st.lists(PART, min_size=1, max_size=5).map("".join).filter(str.strip)
TEMPLATES = [templates.REASONING, DROPS, OPENS, REWRITES, templates.STRIPPING, templates.LLAMA3, templates.MARKED]


@given(st.lists(SAID, min_size=1, max_size=2), st.sampled_from(TEMPLATES))
def test_any_answer_is_learned_whole_or_refused(answers, template):
    """But for white space and a mark that the prompt has already."""

    def squeezed(text: str) -> str:
        return "".join(text.replace("<think>", "").split())

    tokenizer = make(template)
    try:
        documents = conversation_documents(tokenizer, chat(*[text for answer in answers for text in ("q", answer)]))
    except Fault as fault:
        assert fault.kind in ("mask unsure", "answer changed")
        return
    assert len(documents) in (1, len(answers))
    for answer, document in zip(answers, documents * len(answers), strict=False):
        if not isinstance(document, Fault):
            assert squeezed(answer) in squeezed("".join(learned(tokenizer, *document)))


MARKED_STRIPPING = templates.STRIPPING.replace(
    "{{ m.content if", "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content if"
).replace("[-1] }}", "[-1] }}{% endgeneration %}{% endif %}")


@pytest.mark.parametrize(
    ("template", "end", "opened"),
    [
        (templates.STRIPPING, "<|im_end|>", ""),
        (MARKED_STRIPPING, "", ""),
        (templates.REASONING, "<|eos|>", "<think>\n"),
    ],
)
def test_every_answer_makes_a_document_where_a_template_changes_earlier_ones(template, end, opened):
    """Each is learned whole, after what the model read when it wrote it; the last one is `conversation_tokens`'."""
    tokenizer = make(template)
    messages = chat("one", "<think>\nhm</think>Hello", "two", "<think>\noh</think>fine", "three")
    documents = conversation_documents(tokenizer, messages)
    for index, (tokens, mask) in zip((1, 3), documents, strict=True):
        answer = messages[index]["content"].removeprefix(opened)
        assert learned(tokenizer, tokens, mask) == [answer + end]
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(tokens).startswith(prompt + answer + end) and ("hm" in prompt) == (index > 3)
    assert answers_of(tokenizer, messages) == [messages[3]["content"].removeprefix(opened) + end]
    if not opened:  # without reasoning nothing is changed, and one document holds both
        plain = chat("Hello", "Hello", "how", "fine")
        assert answers_of(tokenizer, plain) == ["Hello" + end, "fine" + end]
        assert len(conversation_documents(tokenizer, plain)) == 1


def test_an_answer_that_cannot_be_learned_leaves_the_others():
    """As of conversations that keep the reasoning of the last answer alone."""
    tokenizer = make(templates.REASONING)
    messages = chat("one", "Hello", "two", "why</think>fine")
    first, (tokens, mask) = conversation_documents(tokenizer, messages)
    assert isinstance(first, Fault) and "message 2 does not end" in str(first)
    assert learned(tokenizer, tokens, mask) == ["why</think>fine<|eos|>"]
    assert fault_of(tokenizer, messages).kind == "mask unsure"
    messages[1]["weight"] = 0
    assert answers_of(tokenizer, messages) == ["why</think>fine<|eos|>"]
    assert "message 4" in str(fault_of(tokenizer, chat("one", "why</think>Hello", "two", "fine")))
    assert "message 2" in str(fault_of(tokenizer, chat("one", "Hello", "two", "fine")))


@pytest.mark.parametrize("template", [templates.CHATML, templates.MARKED, templates.MISTRAL])
def test_answers_of_weight_0_are_not_learned(template):
    tokenizer = make(template)
    messages = chat("a", "first", "b", "second", "c", "third")
    every = answers_of(tokenizer, messages)
    for weights in ((0, 1, 1), (0.0, None, 1.0), (1, 0, 0), (True, False, True)):
        for message, weight in zip(messages[1::2], weights, strict=True):
            message["weight"] = weight
        messages[0]["weight"], messages[2]["weight"], messages[4]["weight"] = 0, None, 0.3
        kept = [text for text, weight in zip(every, weights, strict=True) if weight is None or weight]
        assert answers_of(tokenizer, messages) == kept


@pytest.mark.parametrize(
    ("template", "fault"),
    [(READS, None), (templates.CHATML, "its reasoning_content"), (templates.REASONING, "message 2")],
)
def test_reasoning_in_a_field_of_its_own(template, fault):
    messages = [*chat("q"), {"role": "assistant", "content": "ans", "reasoning_content": "why\nso"}]
    if fault is None:
        assert answers_of(make(template), messages) == ["<think>why\nso</think>ans<|im_end|>"]
    else:
        assert fault in str(fault_of(make(template), messages))


ARGUMENTS = {"city": 'K\u00f6ln "Mitte"', "days": [1, 2.5], "deep": {"all": True, "none": None}}
DUMPED = json.dumps(ARGUMENTS, ensure_ascii=False)
AS_JSON = TOOLS.replace("GENERATION", "").replace("END", "")
CALL = "call {{ call.function.name }} {{ call.function.arguments | tojson }}"


@pytest.mark.parametrize(
    ("written", "learned_call"),
    [
        (CALL, f"call look {DUMPED}"),
        # Templates that read text: they fail on an object, or write it as Python does.
        (
            "call {{ call.function.name + call.function.arguments }}",
            f"call look{DUMPED}",
        ),
        ("{{ call.function.name }} {{ call.function.arguments }}", f"look {DUMPED}"),
        # A template that writes an answer wherever there is a content, if only an empty one.
        (
            CALL
            + "{% endfor %}{% if m.content is defined and m.content is not none %}nothing{% endif %}{% for _ in [] %}",
            f"call look {DUMPED}",
        ),
        (
            "<{{ call.function.name }}>{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
            "<look>city=K\u00f6ln \"Mitte\";days=[1, 2.5];deep={'all': True, 'none': None};",
        ),
    ],
)
def test_tool_calls_are_learned_as_the_template_writes_them(written, learned_call):
    tokenizer = make(AS_JSON.replace(CALL, written))
    function = {"name": "look", "arguments": ARGUMENTS}
    text = {"name": "look", "arguments": DUMPED}
    forms = [[{"type": "function", "function": function}], [{"function": text}]]
    fields = [{"tool_calls": calls} for calls in [*forms, *map(json.dumps, forms)]]
    for calling in [*fields, {"function_call": text}]:
        messages = [*chat("q"), {"role": "assistant", "content": None} | calling]
        assert answers_of(tokenizer, messages) == [learned_call + "<|im_end|>"]


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
@pytest.mark.parametrize(
    ("written", "content", "says"),
    [
        ("", None, "'look' of a tool call"),  # the end of the turn alone would be learned
        ("call {{ call.function.name }}", None, "'Oslo' of a tool call"),
        ("call {{ call.function.arguments | tojson }}", None, "'look' of a tool call"),
        (CALL, "I will look.", "its content"),
        ("", "I will look at Oslo.", "of a tool call"),
    ],
)
def test_what_a_template_leaves_out_of_a_call_is_refused(marks, written, content, says):
    template = TOOLS.replace("GENERATION", marks[0]).replace("END", marks[1]).replace(CALL, written)
    if content and not written:
        template = template.replace("{% else %}{{ m.content }}", "{{ m.content }}{% else %}{{ m.content }}", 1)
    calls = [{"function": {"name": "look", "arguments": {"at": "Oslo"}}}]
    fault = fault_of(make(template), [*chat("q"), {"role": "assistant", "content": content, "tool_calls": calls}])
    assert fault.kind == "answer changed" and says in str(fault)


@pytest.mark.parametrize("call", ["look", {"function": {"name": "look", "arguments": "not JSON"}}, {"function": None}])
def test_tool_calls_of_other_forms_are_the_templates(call):
    template = AS_JSON.replace(CALL, "{{ call | tojson }}")
    messages = [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert answers_of(make(template), messages) == [json.dumps(call) + "<|im_end|>"]


@pytest.mark.parametrize(
    "expression",
    [
        "1 // 0",
        "messages[7].content.x",
        "'a' + 1",
        "raise_exception('no')",
        "range(10 ** 9)",
        "messages | nothing_such(1)",
    ],
)
def test_whatever_a_template_raises_is_a_fault_of_the_conversation(expression):
    if "nothing_such" in expression:  # found when the template is read, not when it runs
        with pytest.raises(ValueError, match="not valid Jinja"):
            answers_of(make("{{ " + expression + " }}"), chat("q", "ans"))
    else:
        assert fault_of(make("{{ " + expression + " }}"), chat("q", "ans")).kind == "template refuses"
