"""Renders conversations with a chat template, and finds the spans of its {% generation %} marks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from eagle_jax.files.jsonl import Fault
from eagle_jax.train.data.messages import function_of, missing_part, with_calls

Span: TypeAlias = tuple[int, int]  # start and exclusive end, in characters or tokens

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
KEEP_TOKENS = "let `eagle-jax train regenerate` write the answers, which keeps their tokens"
USE_MARKS = f"give a chat template that marks them with {{% generation %}} and {{% endgeneration %}}, or {KEEP_TOKENS}"


def read_template(path: str | None) -> str | None:
    """Reads a chat template's file; None without a path. Raises ValueError if it is not UTF-8."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {path}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from error


def chat_template_of(
    tokenizer: Any, chat_template: str | None, tools: list[Any] | None, option: str = "chat_template"
) -> str:
    """Returns the given chat template, or the tokenizer's.

    Raises:
      ValueError: if there is neither, naming the `option` that sets one.
    """
    try:
        return tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise ValueError(f"conversations need a chat template, give {option}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A tokenizer, a chat template in Jinja, and the tools that it is given."""

    tokenizer: Any
    template: str
    tools: list[Any] | None

    @property
    def marked(self) -> bool:
        """Returns whether the template has {% generation %} marks."""
        return MARK.search(self.template) is not None

    def text(self, chat: list[dict[str, Any]], prompt: bool = False) -> str:
        """Renders messages. prompt: append the generation prompt."""
        with template_errors():
            return self.tokenizer.apply_chat_template(
                chat, tools=self.tools, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )

    def with_calls(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Converts tool calls to the form of `messages.with_calls` that the template renders completely.

        Raises:
          Fault: if the template fails on all forms.
        """
        if not any("tool_calls" in message for message in chat):
            return chat
        rendered, faults = [], []
        for objects, empty in itertools.product((True, False), (None, "")):
            made = with_calls(chat, objects, empty)
            try:
                rendered.append((made, self.text(made)))
            except Fault as fault:
                faults.append(fault)
        if not rendered:
            raise faults[0]
        fewest = min(text.count("None") for _, text in rendered)  # some templates print a content of None as "None"
        sound = [(made, text) for made, text in rendered if text.count("None") == fewest]
        return next((made for made, text in sound if _writes_calls(made, text)), sound[0][0])

    def marks(self, chat: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """Renders messages; returns the text and the marked spans."""
        return _render_marks(self.template, json.dumps(self.tokenizer.special_tokens_map), chat, self.tools)

    def check_marks(self, chat: list[dict[str, Any]]) -> None:
        """Refuses a template whose marks are misplaced: see `_check_marks`."""
        probes = [{**message, "content": probe(index)} for index, message in enumerate(chat)]
        special = json.dumps(self.tokenizer.special_tokens_map)
        _check_marks(self.template, special, json.dumps(probes), json.dumps(self.tools))


def _writes_calls(chat: list[dict[str, Any]], text: str) -> bool:
    """Returns whether a text contains all tool calls, with no arguments as the repr of a Python dictionary."""
    calling = [message for message in chat if "tool_calls" in message]
    arguments = [function_of(call).get("arguments") for message in calling for call in message["tool_calls"]]
    as_python = any(isinstance(value, dict) and value and repr(value) in text for value in arguments)
    return not as_python and all(missing_part(message, text) is None for message in calling)


def unsure(message: str) -> NoReturn:
    raise Fault("mask unsure", f"it is not sure which tokens are the assistant's: {message}; {USE_MARKS}")


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """Converts exceptions of a template to a Fault of the conversation, or to an error of the template."""
    import jinja2

    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
    except Exception as error:  # a template may raise any exception
        said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise Fault("template refuses", f"the chat template refuses this conversation: {said}") from error


def _render_marks(template: str, special: str, chat: Any, tools: Any) -> tuple[str, list[Span]]:
    """Renders a conversation; returns the text and the marked spans that are not empty.

    `apply_chat_template(return_assistant_tokens_mask=True)` is wrong in three cases. If a mark begins at a character
    without a token, its mask omits everything after; if one ends there, it includes everything after. A character of
    several tokens only gets its first token.
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


def probe(index: int) -> str:
    return f"probe{index}end"


@functools.lru_cache(maxsize=1024)
def _check_marks(template: str, special: str, probes: str, tools: str) -> None:
    """Checks on probe messages of the same roles that the marks contain every answer and nothing else.

    Marks inside a macro, for example, give wrong positions. Results are cached by the roles.

    Args:
      special: JSON of the special tokens. probes: JSON of the messages, with probes as contents. tools: JSON.
    """
    chat = json.loads(probes)
    try:
        text, spans = _render_marks(template, special, chat, json.loads(tools))
    except Fault as error:
        unsure(f"the chat template cannot be tried on other contents ({error})")
    for index, message in enumerate(chat):
        places = [found.span() for found in re.finditer(probe(index), text)]
        marked = any(first <= start and end <= last for start, end in places for first, last in spans)
        own, name = message["role"] == "assistant", f"message {index + 1}, of role {message['role']!r},"
        if marked and not own:
            unsure(f"{name} stands inside the chat template's marks")
        # A template may omit the content of a message with tool calls.
        if own and not marked and (places or not message.get("tool_calls")):
            unsure(f"{name} stands outside the chat template's marks")
