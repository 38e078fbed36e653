"""Reads prompts from files, and encodes texts and conversations to token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eagle_jax.files.jsonl import Fault, read_lines, read_values
from eagle_jax.files.records import is_list, text_tokens

JSON_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
OBJECT = (  # what an object of a prompt file holds
    '"prompt" or "text" (a string), "tokens" (a list of ids), "turns" (a list of strings: what a user says in turn, as '
    'in MT-bench) or "messages" (objects with role and content, the last one not the assistant\'s)'
)
OWN_IDS = ("id", "question_id")  # of the user's, kept in the output


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation to answer: messages with "role" and "content", and the tools it may call."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    where: the file and line, for messages. tokens: its ids. text: as the user wrote it; None for ids. later_turns: what
    the user says after each answer, later_tokens long by themselves. own: the user's "id" or "question_id". fault: why
    it cannot be used, or None.
    """

    where: str
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str | None = None
    later_turns: tuple[str, ...] = ()
    later_tokens: int = 0
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fault: str | None = None

    @property
    def turns(self) -> int:
        """How many answers it asks for."""
        return 1 + len(self.later_turns)

    def longest(self, max_new_tokens: int) -> int:
        """Estimates from above the tokens of all its turns, and of all answers but the last."""
        return len(self.tokens) + self.later_tokens + max_new_tokens * len(self.later_turns)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError if there is none."""
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer (tokenizer.json, ... beside its config.json), so prompts must be token ids: "
            'a .jsonl file for `generate --prompts` with lines such as {"tokens": [1, 2]}'
        )


def check_text(name: str, text: str) -> str:
    """Returns a text of the user's without a byte order mark.

    Args:
      name: what holds it, for the message, such as --prompt.
    Raises:
      ValueError: if it holds half surrogates, which bytes that are not UTF-8 are read as: no tokenizer takes them.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start + 1} is not UTF-8; save or send it as UTF-8") from error
    return text.removeprefix("\ufeff")


def has_template(tokenizer: Any, raw: bool) -> bool:
    """Returns whether prompts are encoded as chat messages: there is a template, and `raw` is False."""
    return not raw and bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, prompt: str | Chat, raw: bool) -> list[int]:
    """Encodes a prompt to token ids: a text as a user's message if there is a chat template, unless `raw`.

    Args:
      tokenizer: None is refused.
    Raises:
      ValueError: if there is no tokenizer; for text that is not UTF-8; for a conversation without a template, or one
        that the template refuses.
    """
    check_tokenizer(tokenizer)
    if isinstance(prompt, str):
        check_text("the prompt", prompt)
    if has_template(tokenizer, raw):
        chat = prompt if isinstance(prompt, Chat) else Chat([{"role": "user", "content": prompt}])
        return encode_messages(tokenizer, chat.messages, chat.tools)
    if isinstance(prompt, Chat):
        raise ValueError("messages need a chat template, which this model lacks or --raw leaves out")
    return text_tokens(tokenizer, prompt)


def encode_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> list[int]:
    """Encodes a conversation to token ids by the chat template, up to the assistant's answer.

    Args:
      messages: each with "role" and "content".
    Raises:
      ValueError: if the template refuses the messages, such as a system message that it does not know, or fails.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it can raise anything
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        raise ValueError(f"the model's chat template refuses this conversation: {kind}{error}") from error
    return text_tokens(tokenizer, text, add_special_tokens=False)  # the template wrote them


def read_prompts(
    path: str,
    encode: Callable[[str | Chat], list[int]],
    check: Callable[[list[int]], None] = lambda tokens: None,
    keep_faults: bool = False,
) -> list[Prompt]:
    """Reads the prompts of a file.

    Args:
      path: JSON Lines or a JSON array (.jsonl, .json, also .gz) of strings, or of objects as OBJECT says; any other
        file holds a prompt a line. UTF-8, or UTF-16 or UTF-32 with a byte order mark.
      encode: a prompt to token ids; not called for "tokens". check: of token ids. Both raise ValueError.
      keep_faults: whether a prompt that cannot be used is returned with its `fault`, rather than raised.
    Raises:
      ValueError: naming the line; with `keep_faults` if there is no prompt that can be used.
    """
    is_json = path.lower().endswith(JSON_FILES)
    found = []
    for entry in (read_values if is_json else read_lines)(path):
        where = f"{path}, line {entry.line}" + (f", entry {entry.number}" if entry.number else "")
        try:
            if isinstance(entry.value, Fault):
                raise ValueError(f"{entry.value.kind}: {entry.value}")
            prompt = _prompt(entry.value, where, encode)
            check(prompt.tokens)
            found.append(prompt)
        except ValueError as error:
            own = entry.value if isinstance(entry.value, dict) else {}
            found.append(Prompt(where, own=_own(own), fault=f"{where}: {error}"))
            if not keep_faults:
                raise ValueError(found[-1].fault) from error
    if not found:
        raise ValueError(f"{path}: holds no prompts")
    if all(prompt.fault for prompt in found):
        more = "" if len(found) == 1 else f" (and none of the other {len(found) - 1} can be used)"
        raise ValueError(f"{found[0].fault}{more}")
    return found


def _prompt(value: Any, where: str, encode: Callable[[str | Chat], list[int]]) -> Prompt:
    """Makes a prompt of a line of text or a JSON value; raises ValueError for other values."""
    if isinstance(value, str):
        return Prompt(where, encode(value), value)
    if isinstance(value, dict):
        own = _own(value)
        if is_list(tokens := value.get("tokens"), int):
            return Prompt(where, tokens, own=own)
        for text in (value.get("prompt"), value.get("text")):
            if isinstance(text, str):
                return Prompt(where, encode(text), text, own=own)
        if is_list(turns := value.get("turns"), str) and turns:
            later = turns[1:]
            later_tokens = sum(len(encode(turn)) for turn in later)
            return Prompt(where, encode(turns[0]), turns[0], tuple(later), later_tokens, own)
        messages = value.get("messages")
        if is_list(messages, dict) and messages and messages[-1].get("role") not in (None, "assistant"):
            said = messages[-1].get("content")
            text = said if isinstance(said, str) else None
            return Prompt(where, encode(Chat(messages, value.get("tools"))), text, own=own)
    raise ValueError(f"neither a string nor an object with {OBJECT}")


def _own(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in OWN_IDS if name in value}
