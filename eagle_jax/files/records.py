"""Records of prompt and training files: the forms that an object of such a file may have, and what each must hold.

    text                    {"text": "..."}
    prompt                  {"prompt": "..."}
    prompt and completion   {"prompt": "...", "completion": "..."}
    tokens                  {"tokens": [1, 2], "loss_mask": [0, 1]}; the mask is optional
    turns                   {"turns": ["...", "..."]}, what a user says in turn
    messages                {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}; tools are optional
    conversations           {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."} of ShareGPT

Training learns from all but prompts and turns, and `eagle-jax train regenerate` reads prompts, too. `eagle-jax generate
--prompts` reads texts, prompts, tokens, turns and messages.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from eagle_jax.files.jsonl import Fault

FORMS = {  # the keys that make a record one of a form, for training
    "text": ("text",),
    "prompt and completion": ("prompt", "completion"),
    "tokens": ("tokens",),
    "messages": ("messages",),
    "conversations": ("conversations",),
}
CONVERSATIONS = ("messages", "conversations")
LET_REGENERATE = "`eagle-jax train regenerate` lets the target answer"


class Encoded(NamedTuple):
    """A document as token ids [T], and its mask [T]: 1 for the tokens to learn."""

    tokens: Sequence[int] | np.ndarray
    mask: Sequence[int] | np.ndarray


def as_object(value: Any) -> dict[str, Any]:
    """Returns the JSON object that a record must be; raises the Fault that stands for one."""
    if isinstance(value, Fault):
        raise value
    if not isinstance(value, dict):
        raise Fault("unknown format", f"a record must be a JSON object, and this one is a {type(value).__name__}")
    return value


def form_of(record: Mapping[str, Any]) -> str:
    """Returns the one of FORMS that a record has."""
    held = [name for name, keys in FORMS.items() if all(record.get(key) is not None for key in keys)]
    if len(held) == 1:
        return held[0]
    what = f"holds {' and '.join(map(repr, held))}" if held else f"has the keys {', '.join(map(repr, record))}"
    lists = [
        key for key, value in record.items() if isinstance(value, list) and any(isinstance(v, dict) for v in value)
    ]
    if not held and record.get("prompt") is not None:
        what += f"; a prompt alone has nothing to learn: {LET_REGENERATE}"
    elif not held and lists:
        what += f"; if the records are the list under {lists[0]!r}, write that list alone to a file"
    raise Fault("unknown format", f"a record must be exactly one of {', '.join(FORMS)}; this one {what}")


def check_texts(record: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuses texts that are no strings, or a last one that is empty."""
    for key in keys:
        if not isinstance(record[key], str):
            raise Fault("unknown format", f"{key!r} must be a string, and is a {type(record[key]).__name__}")
    if not record[keys[-1]]:
        raise Fault("empty text", f"{keys[-1]!r} is empty")


def given_tokens(tokens: Any, mask: Any) -> Encoded:
    """Returns the tokens and the mask of a record, checked; without a mask, all are learned."""
    if not is_list(tokens, int):
        raise Fault("bad tokens", '"tokens" must be a list of integers')
    if mask is None:
        return Encoded(tokens, np.ones(len(tokens), np.uint8))
    if not is_list(mask, int) or not all(bit in (0, 1) for bit in mask):
        raise Fault("bad loss mask", '"loss_mask" must be a list of 0 and 1')
    if len(mask) != len(tokens):
        raise Fault("bad loss mask", f'"loss_mask" has {len(mask)} entries for {len(tokens)} tokens')
    return Encoded(tokens, mask)


def conversation_of(record: Mapping[str, Any]) -> tuple[Any, list[Any] | None]:
    """Returns the messages and the tools of a record of messages or conversations."""
    tools = parsed_list(record.get("tools"), '"tools"')
    if record.get("messages") is not None:
        return record["messages"], tools
    messages, system = record["conversations"], record.get("system")
    if system and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    return messages, tools


def parsed_list(value: Any, name: str) -> list[Any] | None:
    """Returns a list that may be written as JSON text; None if it is empty. name: for messages."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value) if value.strip() else None
    if value is not None and not isinstance(value, list):
        raise Fault("bad message", f"{name} must be a list, or JSON text of one, and is a {type(value).__name__}")
    return value or None


def text_tokens(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """Returns the token ids of a text, or those of each of several; a Fault if the tokenizer fails on it."""
    try:
        return tokenizer(text, verbose=False, **options)["input_ids"]  # a length above its own limit needs no warning
    except Exception as error:  # the tokenizer libraries raise bare Exceptions
        what = f"the model's tokenizer refuses this text: {type(error).__name__}: {error}"
        raise Fault("tokenizer refuses", what) from error


def is_list(value: Any, kind: type) -> TypeGuard[list[Any]]:
    """Returns whether a value is a list of values of just this type: a bool is no int."""
    return isinstance(value, list) and all(type(one) is kind for one in value)
