"""Messages of a conversation in one form, whatever their data set's own; and whether a text holds all of an answer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from eagle_jax.files.jsonl import Fault
from eagle_jax.files.records import LET_REGENERATE, parsed_list

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
NOT_KEPT = ("from", "value", "weight", "function_call")  # of a message's keys
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of a message: what was thought before its content
REASONING = {  # how reasoning begins and ends inside a content
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
}
REASONING_MARK = re.compile(rf"\s*({'|'.join(map(re.escape, [*REASONING, *REASONING.values()]))})\s*")


def normal_messages(messages: Any, answered: bool = True) -> list[dict[str, Any]]:
    """The messages with "role", a "content" that is a string, and a list of tool calls; checked for their order.

    Args:
      answered: whether one of them must be the assistant's; else the last one may be a user's that waits for it.
    """
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
    if not any(message["role"] == "assistant" for message in chat) and (answered or before != "user"):
        raise Fault("wrong roles", f"no message is the assistant's; {LET_REGENERATE}")
    return chat


def is_learned(message: Mapping[str, Any], chat_message: Mapping[str, Any]) -> bool:
    """Whether a message, as given and in its normal form, is an answer to learn: its weight is not 0."""
    return chat_message["role"] == "assistant" and message.get("weight") != 0


def with_calls(chat: list[dict[str, Any]], objects: bool, empty: str | None) -> list[dict[str, Any]]:
    """The messages with their tool calls in one of the forms that templates read.

    Args:
      objects: the arguments of calls become objects, else JSON text; they stay as they are if they are no JSON.
      empty: what stands for a content that a message with calls lacks.
    """

    def changed(call: Any) -> Any:
        function = function_of(call)
        arguments = function.get("arguments")
        if objects and isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        elif not objects and isinstance(arguments, dict | list):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if arguments is function.get("arguments"):
            return call
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    def with_content(message: dict[str, Any]) -> dict[str, Any]:
        calls = [changed(call) for call in message["tool_calls"]]
        return {**message, "tool_calls": calls, "content": message["content"] or empty}

    return [with_content(message) if "tool_calls" in message else message for message in chat]


def missing_part(message: Mapping[str, Any], text: str, before: str = "") -> str | None:
    """Describes the part of an answer that a text lacks; None if the text holds all of it.

    White space around contents, and around the marks of reasoning in them, is the template's.

    Args:
      message: in its normal form.
      before: what stands before the text; a mark at its end that begins reasoning may begin the content, too.
    """
    for key in REASONING_KEYS:
        reasoning = message.get(key)
        if isinstance(reasoning, str) and reasoning.strip() not in text:
            return f"its {key}"
    found = find_content(message["content"] or "", text, before)
    if found is None:
        return "its content"
    text = text[: found[0]] + "\n" + text[found[1] :]  # a call is not found in what is said beside it
    for call in message.get("tool_calls", ()):
        function = function_of(call)
        named = isinstance(function.get("name"), str)
        for value in [function["name"], *_leaves(function.get("arguments"))] if named else _leaves(call):
            if not any(form in text for form in _forms(value)):
                return f"{value!r} of a tool call"
    return None


def find_content(content: str, text: str, before: str = "") -> tuple[int, int] | None:
    """Finds a content in a text; returns its start and its end. See `missing_part`."""
    pieces = [*filter(None, REASONING_MARK.split(without_opening(content, before).strip()))]
    if len(pieces) < 2:  # the rule; patterns of long contents take long to compile
        start = text.find("".join(pieces))
        return None if start < 0 else (start, start + sum(map(len, pieces)))
    found = re.search(r"\s*".join(map(re.escape, pieces)), text)
    return None if found is None else found.span()


def without_opening(content: str, before: str) -> str:
    """A content without the mark that begins its reasoning, if the text before it ends in that."""
    mark = next((mark for mark in REASONING if before.rstrip().endswith(mark)), None)
    if mark is None or not content.lstrip().startswith(mark):
        return content
    rest = content.lstrip()[len(mark) :]
    space = before[len(before.rstrip()) :]
    return rest.removeprefix(space) if rest.startswith(space) else rest.lstrip()


def function_of(call: Any) -> Mapping[str, Any]:
    """The name and arguments of a tool call, which may stand under "function"."""
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _leaves(value: Any) -> Iterator[Any]:
    """The single values in a tool call's arguments."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _forms(value: Any) -> list[str]:
    """How a template may write a single value: as it is, as JSON, or as Python."""
    if value is None:
        return [""]  # arguments of null are often left out
    if isinstance(value, str):
        dumped = [json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        return [value.strip(), *dumped, *[text.replace("'", "\\u0027") for text in dumped], repr(value)[1:-1]]
    return [json.dumps(value), str(value)]


def _normal_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Fault("bad message", f"{name} is no object")
    given = message.get("role", message.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Fault("wrong roles", f"{name}: the role is {given!r}, not one of {', '.join(ROLES)}")
    weight = message.get("weight")
    if role == "assistant" and weight is not None and weight not in (0, 1):
        raise Fault("bad message", f"{name}: weights of answers are 0 (not learned) or 1, got {weight!r}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else parts
    calls = parsed_list(message.get("tool_calls"), f'{name}: "tool_calls"')
    if message.get("function_call") is not None:  # OpenAI's older form of a single call
        calls = [*(calls or []), {"type": "function", "function": message["function_call"]}]
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise Fault("bad message", f"{name}: the content is neither a string nor a list of text parts")
    if is_learned(message, {"role": role}) and not content.strip() and not calls:
        raise Fault("empty answer", f"{name}: the assistant says nothing")
    kept = {key: value for key, value in message.items() if value is not None and key not in NOT_KEPT}
    kept.pop("tool_calls", None)  # templates ask whether there are any, not how many
    if calls:
        kept["tool_calls"] = calls
    return {**kept, "role": role, "content": content}
