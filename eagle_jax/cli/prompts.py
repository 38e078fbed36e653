"""Prompts: from text, files or nowhere, to arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
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
RANDOM_PROMPTS, RANDOM_LENGTH = 4, 24  # of a model without a tokenizer


def encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """The token ids of a prompt: as a user's message if there is a chat template, unless `raw`."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them


def read_prompts(path: str, encode_text: Callable[[str], list[int]]) -> list[list[int]]:
    """The prompts of a file, as token ids.

    Args:
      path: .jsonl, a JSON value a line: {"prompt": text}, {"text": text}, {"turns": [text, ...]} (MT-bench, the first
        turn), {"tokens": [id, ...]} or a plain string. Any other file: a prompt a line.
      encode_text: text to token ids; not called for "tokens".
    Raises:
      ValueError: naming the line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: holds no prompts")
    if Path(path).suffix != ".jsonl":
        return [encode_text(line) for _, line in numbered]
    return [_from_json(line, f"{path}, line {number}", encode_text) for number, line in numbered]


def _from_json(line: str, where: str, encode_text: Callable[[str], list[int]]) -> list[int]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if isinstance(entry, str):
        return encode_text(entry)
    if isinstance(entry, dict):
        tokens = entry.get("tokens")
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return tokens
        turns = entry.get("turns")
        first = turns[0] if isinstance(turns, list) and turns else None
        for text in (entry.get("prompt"), entry.get("text"), first):
            if isinstance(text, str):
                return encode_text(text)
    raise ValueError(f'{where}: neither a string nor an object with "prompt", "text", "turns" or "tokens"')


def default_prompts(vocab_size: int, encode_text: Callable[[str], list[int]]) -> tuple[list[list[int]], str]:
    """Prompts of a bench without a file, and what they are: a few texts, or random tokens without a tokenizer."""
    try:
        return [encode_text(text) for text in DEFAULT_TEXTS], f"{len(DEFAULT_TEXTS)} built-in prompts"
    except CheckpointError:
        random = np.random.default_rng(0).integers(vocab_size, size=(RANDOM_PROMPTS, RANDOM_LENGTH))
        return random.tolist(), f"{RANDOM_PROMPTS} prompts of random tokens (the model has no tokenizer)"
