"""Showing tokens as text while they come."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from eagle_jax.api import Chunk

UNFINISHED = "\ufffd"  # what a tokenizer decodes part of a character to
DRAFTED = "green"  # the colour of text that the draft proposed


class Detokenizer:
    """Token ids in, text out, whole characters only: what may still change is held back."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # characters

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain with these further ids; may be empty."""
        self.ids += ids
        text = self._decode()
        return "" if text.endswith(UNFINISHED) else self._advance(text)

    def finish(self) -> str:
        """What is left, with a replacement character for half a character at the end."""
        return self._advance(self._decode())

    def _decode(self) -> str:
        # All of it, each time: what a token means may depend on the ones before.
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _advance(self, text: str) -> str:
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A finished stream: its tokens, cycles, seconds to the first token, and seconds from there to the last."""

    tokens: list[int]
    cycles: int
    first_seconds: float
    seconds: float

    @property
    def summary(self) -> str:
        """One line. The first token comes from the prompt's pass and counts in no figure but the first."""
        later = len(self.tokens) - 1
        parts = [f"{len(self.tokens)} new tokens", f"{self.cycles} cycles"]
        if self.cycles:
            parts += [f"{later / self.cycles:.2f} tokens a cycle", f"{later / self.seconds:.1f} tok/s"]
        return f"{', '.join(parts)} after the first token, which took {self.first_seconds:.2f} s"


def show(chunks: Iterable[Chunk], tokenizer: Any, console: Any) -> Streamed:
    """Prints one row's stream, of one cycle a chunk, as it comes; accepted draft tokens coloured on a terminal.

    Args:
      console: a rich Console.
    """
    detokenizer = Detokenizer(tokenizer)
    tokens: list[int] = []
    start = first = time.perf_counter()
    cycles = -1  # the first chunk is the prompt's
    for chunk in chunks:
        new, count = jax.device_get((chunk.tokens[0], chunk.counts[0]))
        ids = new[:count].tolist()
        # The last token of a cycle is the target's own, those before it the draft proposed.
        for part, style in ((ids[:-1], DRAFTED), (ids[-1:], None)):
            if part:
                console.out(detokenizer.add(part), style=style, end="", highlight=False)
        tokens += ids
        cycles += 1
        if cycles == 0:
            first = time.perf_counter()
    end = time.perf_counter()
    console.out(detokenizer.finish(), highlight=False)
    return Streamed(tokens, cycles, first - start, end - first)
