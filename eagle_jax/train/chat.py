"""Conversations as tokens, and which of them are the assistant's own.

What the assistant writes is known in one of two ways. A chat template may mark it, by {% generation %} and
{% endgeneration %}. Without marks the conversation is rendered again up to each answer and up to its end: where each is
a prefix of the whole, in text and in tokens, the answer is what lies between. A template that changes what it wrote
before (leaves out earlier reasoning, say) has no such prefixes, and is refused rather than guessed at.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np

from eagle_jax.jsonl import Fault

Kind: TypeAlias = Literal[
    "damaged file",
    "not UTF-8",
    "invalid JSON",
    "unknown format",
    "empty text",
    "bad tokens",
    "bad loss mask",
    "bad message",
    "empty conversation",
    "empty answer",
    "wrong roles",
    "template refuses",
    "mask unsure",
    "token id out of range",
    "nothing to learn",
    "too long",
    "failed",
]
Span: TypeAlias = tuple[int, int]  # characters of a text, or tokens: the first, and the one after the last

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
MAY_FOLLOW = {  # "": at the beginning
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
NOT_KEPT = ("from", "value", "weight")  # of a message's keys
MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
USE_MARKS = "give a chat template that marks them with {% generation %} and {% endgeneration %}"


def conversation_tokens(
    tokenizer: Any, messages: Any, *, chat_template: str | None = None, tools: list[Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation by the chat template, and which of them the assistant wrote.

    An answer is learned with the mark that ends it, which a model must learn to write, but without white space that a
    template puts after that mark. Marks of a template count exactly as they are. What follows the last answer (a
    user's turn) is there and not learned.

    Args:
      tokenizer: of transformers.
      messages: OpenAI's [{"role", "content"}, ...] or ShareGPT's [{"from", "value"}, ...]: first a system message or
        none, then user and assistant in turn; tool messages may stand between two of the assistant's. A content is a
        string or a list of text parts. Other keys ("tool_calls", "reasoning_content") are the template's to read.
      chat_template: Jinja, in place of the tokenizer's own.
      tools: JSON schemas, for the template.
    Returns:
      tokens [T] int32 and mask [T] uint8.
    Raises:
      Fault: if the conversation cannot be used, or it is not sure which tokens are the assistant's.
      ValueError: if there is no chat template, or it is not valid Jinja.
    """
    chat = normal_messages(messages)
    try:
        template = tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise ValueError(f"conversations need a chat template, give chat_template: {error}") from error
    if MARK.search(template):
        text, spans = _marked(tokenizer, template, chat, tools)
        tokens, spans = _token_spans(tokenizer, text, spans, straddling=True)
    else:
        text, spans = _rendered_again(tokenizer, template, chat, tools)
        tokens, spans = _token_spans(tokenizer, text, spans, straddling=False)
        spans = [_without_tail(tokenizer, tokens, span) for span in spans]
    mask = np.zeros(len(tokens), np.uint8)
    for start, end in spans:
        mask[start:end] = 1
    return np.asarray(tokens, np.int32), mask


def normal_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages with "role" and a "content" that is a string; checked for their order."""
    if not isinstance(messages, list):
        raise Fault("bad message", "the messages are no list")
    if not messages:
        raise Fault("empty conversation", "there are no messages")
    chat = [_normal_message(message, f"message {number}") for number, message in enumerate(messages, start=1)]
    before = ""
    for number, message in enumerate(chat, start=1):
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            place = f"follows {before!r}" if before else "comes first"
            expected = " or ".join(map(repr, MAY_FOLLOW[before]))
            raise Fault("wrong roles", f"message {number}: {role!r} {place}, where {expected} must stand")
        before = role
    if not any(message["role"] == "assistant" for message in chat):
        raise Fault("wrong roles", "no message is the assistant's")
    return chat


def _normal_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Fault("bad message", f"{name} is no object")
    given = message.get("role", message.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Fault("wrong roles", f"{name}: the role is {given!r}, not one of {', '.join(ROLES)}")
    if message.get("weight", 1) != 1:
        raise Fault("bad message", f"{name}: weights other than 1 are not supported; leave the record out")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else parts
    calls = message.get("tool_calls")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise Fault("bad message", f"{name}: the content is neither a string nor a list of text parts")
    if role == "assistant" and not content.strip() and not calls:
        raise Fault("empty answer", f"{name}: the assistant says nothing")
    kept = {key: value for key, value in message.items() if value is not None and key not in NOT_KEPT}
    if isinstance(calls, list):
        kept["tool_calls"] = [_parsed_call(call) for call in calls]
    return {**kept, "role": role, "content": content}


def _parsed_call(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates expect; OpenAI writes them as a string of JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def _unsure(message: str) -> NoReturn:
    raise Fault("mask unsure", f"it is not sure which tokens are the assistant's: {message}; {USE_MARKS}")


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """Turns what a template raises into a Fault of the conversation, or an error of the template itself."""
    import jinja2

    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise Fault("template refuses", f"the chat template refuses this conversation: {error}") from error


def _rendered_again(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the span of each answer by rendering its beginnings."""

    def render(count: int, prompt: bool) -> str:
        with template_errors():
            return tokenizer.apply_chat_template(
                chat[:count], tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )

    text = render(len(chat), prompt=False)
    spans = []
    for index, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        name = f"message {index + 1}"
        try:
            before = render(index, prompt=True)
            after = text if index + 1 == len(chat) else render(index + 1, prompt=False)
        except Fault as error:
            _unsure(f"the chat template refuses what comes before or up to {name} ({error})")
        if not (text.startswith(after) and after.startswith(before)):
            _unsure(f"the chat template writes what comes before or up to {name} otherwise when more follows it")
        content, answer = message["content"].strip(), after[len(before) :].strip()
        # Without a generation prompt, a header such as "assistant:" would seem to be the answer's.
        if not (content and answer.startswith(content)) and before == render(index, prompt=False):
            _unsure(
                f"the chat template has no generation prompt, and {name} begins with something else than its content"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _marked(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans that the template marks."""
    special = json.dumps(tokenizer.special_tokens_map)
    probes = [{**message, "content": _probe(index)} for index, message in enumerate(chat)]
    _check_marks(template, special, json.dumps(probes), json.dumps(tools))
    text, spans = _render_marks(template, special, chat, tools)
    answers = sum(message["role"] == "assistant" for message in chat)
    if len(spans) < answers:
        _unsure(f"the chat template marks {len(spans)} pieces of text for {answers} answers")
    return text, spans


def _render_marks(template: str, special: str, chat: Any, tools: Any) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans of its marks that hold any text.

    `apply_chat_template(return_assistant_tokens_mask=True)` makes its mask of these, but drops all that follows a mark
    which begins with a character of no token, learns all that follows one which ends so, and of a character of several
    tokens it learns the first only.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with template_errors():
        rendered: Any = render_jinja_template(
            conversations=[chat],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **json.loads(special),
        )
    (text,), (spans,) = rendered
    return text, [(start, end) for start, end in spans if start < end]


def _probe(index: int) -> str:
    return f"probe{index}end"


@functools.lru_cache(maxsize=1024)
def _check_marks(template: str, special: str, probes: str, tools: str) -> None:
    """Checks that the marks hold every answer, and nothing of the others, on a conversation of the same roles.

    Inside a macro, say, marks give wrong places. Conversations of the same roles share a check: it is cached.

    Args:
      special: JSON of the special tokens. probes: JSON of the messages, with probes as contents. tools: JSON.
    """
    chat = json.loads(probes)
    try:
        text, spans = _render_marks(template, special, chat, json.loads(tools))
    except Fault as error:
        _unsure(f"the chat template cannot be tried on other contents ({error})")
    for index, message in enumerate(chat):
        places = [found.span() for found in re.finditer(_probe(index), text)]
        marked = any(first <= start and end <= last for start, end in places for first, last in spans)
        own, name = message["role"] == "assistant", f"message {index + 1}, of role {message['role']!r},"
        if marked and not own:
            _unsure(f"{name} stands inside the chat template's marks")
        # What is said beside a tool call, a template may leave out.
        if own and not marked and (places or not message.get("tool_calls")):
            _unsure(f"{name} stands outside the chat template's marks")


def _token_spans(tokenizer: Any, text: str, spans: list[Span], straddling: bool) -> tuple[list[int], list[Span]]:
    """The tokens of a text, and its spans of characters as spans of tokens.

    A span begins or ends between two tokens if the pieces of the text, tokenised each alone, give the same tokens. If
    they do not (many tokenizers write something before any text), the text up to there must give the tokens before it:
    surer of single places, but the work grows with the square of the turns.

    Args:
      straddling: a token that reaches over the edge of a span belongs to it; else such a span is refused.
    """
    # The template wrote the special tokens. A length above the tokenizer's own limit is no concern of its warning.
    encode = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
    tokens = encode(text)["input_ids"]
    edges = sorted({0, len(text), *(place for span in spans for place in span)})
    pieces = encode([text[start:end] for start, end in itertools.pairwise(edges)])["input_ids"]
    if list(itertools.chain.from_iterable(pieces)) == tokens:
        exact = dict(zip(edges, itertools.accumulate(map(len, pieces), initial=0), strict=True))
    else:
        starts = encode([text[:place] for place in edges])["input_ids"]
        exact = {place: len(ids) for place, ids in zip(edges, starts, strict=True) if tokens[: len(ids)] == ids}
    offsets = []
    if straddling and tokenizer.is_fast and len(exact) < len(edges):
        offsets = encode(text, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for start, end in spans:
        first, last = exact.get(start), exact.get(end)
        if offsets and (first is None or last is None):
            inside = [index for index, (begin, stop) in enumerate(offsets) if begin < end and start < stop]
            first = min(inside, default=None) if first is None else first
            last = max(inside, default=-1) + 1 if last is None else last
        if first is None or last is None or first >= last:
            _unsure(f"no token begins or ends where the text {_short(text[start:end])} does")
        found.append((first, last))
    return tokens, found


def _without_tail(tokenizer: Any, tokens: list[int], span: Span) -> Span:
    """A span of tokens without the white space after its last special token, which only a template writes."""
    start, end = span
    special = _special_tokens(tokenizer)
    last = next((index for index in reversed(range(start, end)) if tokens[index] in special), None)
    if last is None or tokenizer.decode(tokens[last + 1 : end]).strip():
        return span
    return start, last + 1


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> frozenset[int]:
    return frozenset(token for token, text in tokenizer.added_tokens_decoder.items() if text.special)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:20]} ... {text[-15:]}")
