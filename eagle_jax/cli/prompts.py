"""Prompts: from text, files or nowhere, to arrays."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert import CheckpointError

DEFAULT_TEXTS = (
    "Write a Python function that merges two sorted lists.",
    "Explain in three sentences how a bicycle stays upright.",
    "List five European capitals and the river that each one lies on.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Show the steps.",
)
CODE_TEXTS = (  # for the embedded pair, which continues Python code
    "def __init__(self",
    "class Error(Exception):",
    "    for key, value in self.items():",
    'if __name__ == "__main__":',
    "import os\nimport sys\n",
    "    def test_",
    'def read(self, size=-1):\n    """',
    "    if not isinstance(",
)
RANDOM_PROMPTS, RANDOM_LENGTH = 4, 24  # of a model without a tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a file: its token ids, its text if it has one, and where it stands, for messages."""

    tokens: list[int]
    text: str | None
    where: str


def has_template(tokenizer: Any, raw: bool) -> bool:
    """Whether prompts are messages of a chat: there is a template, and --raw does not forbid it."""
    return not raw and bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """The token ids of a prompt: as a user's message if there is a chat template, unless `raw`."""
    if has_template(tokenizer, raw):
        return encode_messages(tokenizer, [{"role": "user", "content": text}])
    return tokenizer(text)["input_ids"]


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The token ids of a conversation by the chat template, up to where the assistant answers.

    Args:
      messages: each with "role" and "content".
    Raises:
      ValueError: if the template refuses the messages, such as a system message that it does not know.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them


def read_prompts(path: str, encode_text: Callable[[str], list[int]]) -> list[Prompt]:
    """The prompts of a file.

    Args:
      path: .jsonl, a JSON value a line: {"prompt": text}, {"text": text}, {"turns": [text, ...]} (MT-bench, the first
        turn), {"tokens": [id, ...]} or a plain string. Any other file: a prompt a line.
      encode_text: text to token ids; not called for "tokens".
    Raises:
      ValueError: naming the line.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: holds no prompts")
    read = _from_json if Path(path).suffix == ".jsonl" else (lambda line, where: line)
    found = []
    for where, line in numbered:
        prompt = read(line, where)
        tokens, text = (encode_text(prompt), prompt) if isinstance(prompt, str) else (prompt, None)
        found.append(Prompt(tokens, text, where))
    return found


def _from_json(line: str, where: str) -> str | list[int]:
    """The text or the token ids of a line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        tokens = entry.get("tokens")
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return tokens
        turns = entry.get("turns")
        first = turns[0] if isinstance(turns, list) and turns else None
        for text in (entry.get("prompt"), entry.get("text"), first):
            if isinstance(text, str):
                return text
    raise ValueError(f'{where}: neither a string nor an object with "prompt", "text", "turns" or "tokens"')


def default_prompts(
    vocab_size: int, encode_text: Callable[[str], list[int]], texts: Sequence[str] = DEFAULT_TEXTS
) -> tuple[list[list[int]], str]:
    """Prompts of a bench without a file, and what they are: a few texts, or random tokens without a tokenizer."""
    try:
        return [encode_text(text) for text in texts], f"{len(texts)} built-in prompts"
    except CheckpointError:
        random = np.random.default_rng(0).integers(vocab_size, size=(RANDOM_PROMPTS, RANDOM_LENGTH))
        return random.tolist(), f"{RANDOM_PROMPTS} prompts of random tokens (the model has no tokenizer)"


def to_measure(
    path: str | None, folder: Path, vocab_size: int, raw: bool, texts: Sequence[str] = DEFAULT_TEXTS
) -> tuple[list[list[int]], str]:
    """The prompts of a measurement, and what they are: those of a file, or built-in ones.

    Args:
      folder: of the tokenizer, which a file of token ids does without. raw: see `encode`.
    """
    from eagle_jax import convert

    tokenizer = functools.cache(lambda: convert.tokenizer(folder))

    def encode_text(text: str) -> list[int]:
        return encode(tokenizer(), text, raw)

    if path is None:
        return default_prompts(vocab_size, encode_text, texts)
    return [prompt.tokens for prompt in read_prompts(path, encode_text)], path
