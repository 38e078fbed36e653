"""Normalises the messages of conversations, and checks that a rendered text contains a whole answer."""

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
MAY_FOLLOW = {  # role: the roles that may come next; "" is the start
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
NOT_KEPT = ("from", "value", "weight", "function_call")  # keys of a message that the normal form drops
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # keys of a message's reasoning
REASONING = {  # opening and closing marks of reasoning inside a content
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
}
REASONING_MARK = re.compile(rf"\s*({'|'.join(map(re.escape, [*REASONING, *REASONING.values()]))})\s*")


def normal_messages(messages: Any, answered: bool = True) -> list[dict[str, Any]]:
    """Returns messages with "role", "content" as a string and "tool_calls" as a list; checks the order of roles.

    Args:
      answered: require an assistant message; otherwise the last one may be a user's that awaits an answer.
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
    """Returns whether a message, given raw and normalised, is an assistant's with a weight other than 0."""
    return chat_message["role"] == "assistant" and message.get("weight") != 0


def with_calls(chat: list[dict[str, Any]], objects: bool, empty: str | None) -> list[dict[str, Any]]:
    """Converts tool calls to one of the forms that templates expect.

    Args:
      objects: convert arguments to objects, otherwise to JSON text; arguments that are not JSON stay unchanged.
      empty: the content of a message that has calls only.
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
    """Describes the first part of an answer that a text lacks; None if the text contains all of it.

    White space around contents and around reasoning marks is ignored: templates change it.

    Args:
      message: normalised.
      before: the text before. If it ends in an opening reasoning mark, the content may repeat that mark.
    """
    for key in REASONING_KEYS:
        reasoning = message.get(key)
        if isinstance(reasoning, str) and reasoning.strip() not in text:
            return f"its {key}"
    found = find_content(message["content"] or "", text, before)
    if found is None:
        return "its content"
    text = text[: found[0]] + "\n" + text[found[1] :]  # cut the content out: it may mention a call
    for call in message.get("tool_calls", ()):
        function = function_of(call)
        named = isinstance(function.get("name"), str)
        for value in [function["name"], *_leaves(function.get("arguments"))] if named else _leaves(call):
            if not any(form in text for form in _forms(value)):
                return f"{value!r} of a tool call"
    return None


def find_content(content: str, text: str, before: str = "") -> tuple[int, int] | None:
    """Returns start and end of a content in a text, ignoring white space as `missing_part` does."""
    pieces = [*filter(None, REASONING_MARK.split(without_opening(content, before).strip()))]
    if len(pieces) < 2:  # the common case: compiling a pattern of a long content is slow
        start = text.find("".join(pieces))
        return None if start < 0 else (start, start + sum(map(len, pieces)))
    found = re.search(r"\s*".join(map(re.escape, pieces)), text)
    return None if found is None else found.span()


def without_opening(content: str, before: str) -> str:
    """Drops a content's opening reasoning mark if the text before it already ends in that mark."""
    mark = next((mark for mark in REASONING if before.rstrip().endswith(mark)), None)
    if mark is None or not content.lstrip().startswith(mark):
        return content
    rest = content.lstrip()[len(mark) :]
    space = before[len(before.rstrip()) :]
    return rest.removeprefix(space) if rest.startswith(space) else rest.lstrip()


def function_of(call: Any) -> Mapping[str, Any]:
    """Returns the mapping with name and arguments of a tool call, which may be nested under "function"."""
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _leaves(value: Any) -> Iterator[Any]:
    """Yields the scalar values in a tool call's arguments."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _forms(value: Any) -> list[str]:
    """Returns the ways in which a template may write a scalar: str, JSON, or Python repr."""
    if value is None:
        return [""]  # templates often omit null arguments
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
    if message.get("function_call") is not None:  # OpenAI's deprecated single-call form
        calls = [*(calls or []), {"type": "function", "function": message["function_call"]}]
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise Fault("bad message", f"{name}: the content is neither a string nor a list of text parts")
    if is_learned(message, {"role": role}) and not content.strip() and not calls:
        raise Fault("empty answer", f"{name}: the assistant says nothing")
    kept = {key: value for key, value in message.items() if value is not None and key not in NOT_KEPT}
    kept.pop("tool_calls", None)  # templates test for the key, not for its length
    if calls:
        kept["tool_calls"] = calls
    return {**kept, "role": role, "content": content}
