"""What to measure with where the user names nothing: built-in prompts, random ones, and the embedded pair."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

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


def embedded_pair() -> Path:
    """Returns the folder of the embedded pair: target/, head/ (EAGLE-3) and head_eagle1/."""
    return Path(str(resources.files("eagle_jax") / "pair"))
