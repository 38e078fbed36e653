"""Default inputs of measurements: built-in prompts, random ones, and the embedded pair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from eagle_jax.convert.tokenizing import tokenizer_of
from eagle_jax.files.prompts import Chat, encode, read_prompts

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
RANDOM_PROMPTS, RANDOM_LENGTH = 4, 24  # of `random_prompts`


def random_prompts(vocab_size: int) -> tuple[list[list[int]], str]:
    """Returns prompts of random tokens, the same in every run, and what they are."""
    random = np.random.default_rng(0).integers(vocab_size, size=(RANDOM_PROMPTS, RANDOM_LENGTH))
    return random.tolist(), f"{RANDOM_PROMPTS} prompts of random tokens"


def to_measure(
    path: str | None,
    folder: Path,
    raw: bool,
    texts: Sequence[str] = DEFAULT_TEXTS,
    check: Callable[[list[int]], None] = lambda tokens: None,
) -> tuple[list[list[int]], str]:
    """Returns the prompts of a measurement and a description: those of a file, or a few texts.

    Args:
      folder: of the tokenizer; token ids need none. raw: see `encode`. check: see `read_prompts`.
    Raises:
      ValueError: if there is no tokenizer for texts; CheckpointError: for an unusable one.
    """
    tokenizer = functools.cache(lambda: tokenizer_of(folder))

    def to_tokens(prompt: str | Chat) -> list[int]:
        return encode(tokenizer(), prompt, raw)

    if path is not None:
        return [prompt.tokens for prompt in read_prompts(path, to_tokens, check)], path
    if tokenizer() is None:
        raise ValueError(
            "this model has no tokenizer (tokenizer.json, ... beside its config.json): name a --prompts file of token "
            'ids, with lines such as {"tokens": [1, 2]}; `eagle-jax bench` takes --random-prompts, too'
        )
    return [to_tokens(text) for text in texts], f"{len(texts)} built-in prompts"


def embedded_pair() -> Path:
    """Returns the folder of the embedded pair: target/, head/ (EAGLE-3) and head_eagle1/."""
    return Path(str(resources.files("eagle_jax") / "pair"))
