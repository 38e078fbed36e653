"""Statistics of decoded texts: tokens a cycle, acceptance by draft token and by position, repetition."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

FIRST_RANGE = 256  # positions in the first range of `by_position`


def tokens_a_cycle(new_tokens: int, texts: int, cycles: int) -> float:
    """Returns the mean accepted length, bonus token counted.

    The first new token of each text does not count: it comes from the prompt's pass.
    """
    return (new_tokens - texts) / max(cycles, 1)


def accepted_shares(accepted: Sequence[int]) -> list[float]:
    """Returns the share of cycles that accepted draft token 1, 2, ..., D.

    Args:
      accepted: how many cycles accepted 0, 1, ..., D draft tokens.
    """
    cycles = max(sum(accepted), 1)
    return [sum(accepted[depth:]) / cycles for depth in range(1, len(accepted))]


@dataclasses.dataclass(frozen=True)
class Range:
    """New tokens of all texts at positions start to end - 1; `own` of them are bonus tokens, one a cycle."""

    start: int
    end: int
    tokens: int
    own: int

    @property
    def tokens_a_pass(self) -> float | None:
        """None if no cycle ended here."""
        return self.tokens / self.own if self.own else None


def by_position(drafted: Sequence[Sequence[bool]], prompt_lengths: Sequence[int]) -> list[Range]:
    """Counts new tokens in ranges of positions, prompt included, each range twice as long as the one before.

    Args:
      drafted: which of each text's new tokens the draft proposed.
    """
    texts = list(zip(prompt_lengths, drafted, strict=True))
    # Without each text's first token, which comes from the prompt's pass.
    flags = np.concatenate([np.asarray(text[1:], bool) for _, text in texts])
    positions = np.concatenate([length + 1 + np.arange(len(text[1:])) for length, text in texts])
    found = []
    start, end = 0, FIRST_RANGE
    while (positions >= start).any():
        inside = flags[(positions >= start) & (positions < end)]
        if len(inside):
            found.append(Range(start, end, len(inside), int((~inside).sum())))
        start, end = end, 2 * end
    return found


def distinct_ngrams(texts: Iterable[Sequence[int]], size: int = 4) -> float:
    """Returns the share of a text's n-grams that are distinct, the mean over texts; 1.0 where all are too short.

    A draft guesses a loop easily, so figures of texts that repeat themselves flatter it.
    """
    shares = []
    for text in texts:
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0
