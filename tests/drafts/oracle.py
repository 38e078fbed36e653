"""Oracles in plain Python, one text at a time: Medusa, lookahead and prompt lookup, step by step.

Each yields a Cycle per pass of the target. The model is a function next_tokens(texts) -> the target's greedy next token
after every text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Text = list[int]
NextTokens = Callable[[list[Text]], list[int]]


@dataclasses.dataclass
class Cycle:
    """The guesses (continuations of the text, in order), and the new tokens: the accepted ones and the bonus.

    With fewer guesses than places, the target checks repetitions of the last token in the free places.
    """

    guesses: list[Text]
    gained: Text


def verify(text: Text, guesses: list[Text], next_tokens: NextTokens) -> Text:
    """Returns the longest prefix of a guess that the target would write, and the target's next token."""
    prefixes = sorted({tuple(guess[:length]) for guess in guesses for length in range(len(guess) + 1)} | {()})
    said = dict(zip(prefixes, next_tokens([[*text, *prefix] for prefix in prefixes]), strict=True))
    right = [prefix for prefix in prefixes if all(said[prefix[:i]] == prefix[i] for i in range(len(prefix)))]
    longest = max(right, key=len)
    return [*longest, said[longest]]


def lookahead(
    prompt: Text, next_tokens: NextTokens, window: int, ngram: int, guesses: int, remembered: int, new: int
) -> Iterator[Cycle]:
    """Decodes `new` tokens by lookahead, after the prompt and the target's first token.

    levels[l][c] guesses the token c + l positions after the last one; levels[0][0] is the last one itself.
    """
    text = [*prompt, *next_tokens([prompt])]
    levels = [[text[(level * window + c) % len(text)] for c in range(window)] for level in range(ngram - 1)]
    pool: list[tuple[int, tuple[int, ...]]] = []  # (cycle, n-gram), the latest last
    end, cycle = len(text) + new, 0
    while len(text) < end:
        pool = [(made, gram) for made, gram in pool if made >= cycle - remembered]
        found = [list(gram[1:]) for _, gram in reversed(pool) if gram[0] == text[-1]][:guesses]

        paths = [along(levels, level, column) for level in range(ngram - 1) for column in range(window)]
        top = next_tokens([[*text, *along(levels, ngram - 2, column)] for column in range(window)])
        filler = [[text[-1]] * (ngram - 1)] * (len(found) < guesses)
        gained = verify(text, found + filler + paths, next_tokens)
        grams = []
        for column in range(window):
            first = text[-1] if column == 0 else levels[0][column]
            grams.append((first, *(levels[level][column] for level in range(1, ngram - 1)), top[column]))
        for gram in grams:
            pool = [(made, old) for made, old in pool if old != gram] + [(cycle, gram)]
        levels = [*levels[1:], top]
        cycle += 1
        text = [*text, *gained]
        yield Cycle(found, gained)


def along(levels: list[Text], level: int, column: int) -> Text:
    """Returns the guessed text up to a place of the window, inclusive."""
    return [*levels[0][1 : column + 1], *(levels[above][column] for above in range(1, level + 1))]


def prompt_lookup(
    prompt: Text, next_tokens: NextTokens, length: int, branches: int, ngram: int, new: int
) -> Iterator[Cycle]:
    text = [*prompt, *next_tokens([prompt])]
    end = len(text) + new
    while len(text) < end:
        last = len(text) - 1
        matches = []
        for place in range(last):
            matched = 0
            while matched < min(ngram, place + 1) and text[place - matched] == text[last - matched]:
                matched += 1
            if matched:
                matches.append((matched, place))
        found: list[Text] = []
        looked_at = 1 if branches == 1 else 4 * branches
        for _, place in sorted(matches, reverse=True)[:looked_at]:
            following = text[place + 1 :]
            copy = [following[i % len(following)] for i in range(length)]
            if copy not in found and len(found) < branches:
                found.append(copy)
        filler = [[text[-1]] * length] * (len(found) < branches)
        gained = verify(text, found + filler, next_tokens)
        text = [*text, *gained]
        yield Cycle(found, gained)


def medusa(
    prompt: Text,
    next_tokens: NextTokens,
    heads: Callable[[Text], np.ndarray],
    paths: list[tuple[int, ...]],
    new: int,
) -> Iterator[Cycle]:
    """Decodes by Medusa. heads(text) -> logits [heads, V] of every head on the hidden state after the text."""
    text = [*prompt, *next_tokens([prompt])]
    end = len(text) + new
    while len(text) < end:
        order = np.argsort(-heads(text[:-1]), axis=1, kind="stable")  # [heads, V], the likeliest first
        guesses = [[int(order[head, rank]) for head, rank in enumerate(path)] for path in sorted(paths, key=order_of)]
        gained = verify(text, guesses, next_tokens)
        text = [*text, *gained]
        yield Cycle(guesses, gained)


def order_of(path: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return len(path), tuple(path)
