"""Conversations as tokens, and which of them are the assistant's own.

What the assistant writes is known in one of two ways. A chat template may mark it, by {% generation %} and
{% endgeneration %}. Without marks the conversation is rendered again up to each answer and up to its end: where each is
a prefix of the whole, in text and in tokens, the answer is what lies between. A template that changes what it wrote
before (leaves out earlier reasoning, say) has no such prefixes, and is refused rather than guessed at.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np

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
MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
USE_MARKS = "give a chat template that marks them with {% generation %} and {% endgeneration %}"


class Fault(ValueError):
    """What is wrong with one record. kind: a short name, to count by."""

    def __init__(self, kind: Kind, message: str):
        super().__init__(message)
        self.kind = kind


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
    chat = _normal(messages)
    try:
        template = tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise ValueError("conversations need a chat template, and the tokenizer has none: give chat_template") from error
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


def _normal(messages: Any) -> list[dict[str, Any]]:
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
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    calls = message.get("tool_calls")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise Fault("bad message", f"{name}: the content is neither a string nor a list of text parts")
    if role == "assistant" and not content.strip() and not calls:
        raise Fault("empty answer", f"{name}: the assistant says nothing")
    kept = {key: value for key, value in message.items() if key not in ("from", "value", "weight")}
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


def _render(tokenizer: Any, template: str, chat: Sequence[Mapping[str, Any]], tools: Any, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant answers."""
    with _template_errors():
        return tokenizer.apply_chat_template(
            list(chat), tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )


class _template_errors:
    """Turns what a template raises into a Fault."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import jinja2

        if isinstance(error, jinja2.TemplateSyntaxError):
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
        if isinstance(error, (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)):
            raise Fault("template refuses", f"the chat template refuses this conversation: {error}") from error
