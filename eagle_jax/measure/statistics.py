"""How much texts repeat themselves: a draft guesses a loop easily, so figures of looping texts flatter it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct_ngrams(texts: Iterable[Sequence[int]], size: int = 4) -> float:
    """The share of a text's n-grams of tokens that are distinct; the mean over texts, 1.0 where all are too short."""
    shares = []
    for text in texts:
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0
