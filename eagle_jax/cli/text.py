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
    """Token ids in, text out: whole characters only, and up to a stop string; what may still change is held back.

    The text ends just before the first occurrence of any stop string, however the ids come in pieces.

    ids: those of the text so far. Once a stop string has ended the text (`stopped`), the fewest that complete it.
    text: what was given out so far.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        if "" in stops:
            raise ValueError("a stop string is empty")
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._decided = 0  # of the ids: before these, no stop string is complete

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain with these further ids; may be empty."""
        return self._advance(ids, final=False)

    def finish(self) -> str:
        """What is left, with a replacement character for half a character at the end."""
        return self._advance((), final=True)

    def _advance(self, ids: Sequence[int], final: bool) -> str:
        if self.stopped:
            return ""
        self.ids += ids
        text = self._decode(self.ids)
        if text.endswith(UNFINISHED) and not final:
            return ""
        end, self.stopped = self._end(text, final)
        if self.stopped:
            prefixes = (self.ids[:count] for count in range(self._decided, len(self.ids)))
            self.ids = next((ids for ids in prefixes if self._end(self._decode(ids))[1]), self.ids)
        self._decided = len(self.ids)
        new = text[len(self.text) : end]
        self.text += new
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        # All of it, each time: what a token means may depend on the ones before.
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _end(self, text: str, final: bool = False) -> tuple[int, bool]:
        """Up to where the text is certain, and whether a stop string that begins there ends it."""
        shown = len(self.text)  # no stop string begins before this
        found = min((place for stop in self.stops if (place := text.find(stop, shown)) >= 0), default=len(text))
        if not final:  # the end of the text may be the beginning of a stop string
            longest = max(map(len, self.stops), default=1) - 1
            for start in range(max(shown, len(text) - longest), found):
                if any(stop.startswith(text[start:]) for stop in self.stops):
                    return start, False
        return found, found < len(text)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A finished stream.

    tokens, text: without a stop string, the tokens through the one that completed it. cycles: target passes after
    the prompt's. first_tokens: how many came at once, first_seconds after the start. seconds: from then to the end.
    failed: the model's logits were NaN or infinite. log_probs: of the tokens, if they were asked for.
    """

    tokens: list[int]
    text: str
    cycles: int
    first_tokens: int
    first_seconds: float
    seconds: float
    failed: bool
    log_probs: list[float] | None

    @property
    def summary(self) -> str:
        """One line. The first token comes from the prompt's pass and counts in no figure but the first."""
        parts = [f"{len(self.tokens)} new tokens", f"{self.cycles} cycles"]
        if self.cycles:
            parts.append(f"{(len(self.tokens) - 1) / self.cycles:.2f} tokens a cycle")
        if len(self.tokens) > self.first_tokens:
            parts.append(f"{(len(self.tokens) - self.first_tokens) / self.seconds:.1f} tok/s")
        first = "token" if self.first_tokens <= 1 else f"{self.first_tokens} tokens"
        line = f"{', '.join(parts)} after the first {first}, which took {self.first_seconds:.2f} s"
        if self.log_probs:
            line += f"; mean log-probability {sum(self.log_probs) / len(self.log_probs):.4f}"
        return line


def show(chunks: Iterable[Chunk], tokenizer: Any, console: Any, stops: Sequence[str] = ()) -> Streamed:
    """Prints one row's stream, of one cycle a chunk, as it comes; accepted draft tokens coloured on a terminal.

    Args:
      chunks: the first holds the first new token, and may hold a cycle's. None is asked for after a stop string.
      console: a rich Console.
      stops: strings that end the text.
    """
    detokenizer = Detokenizer(tokenizer, stops)
    tokens: list[int] = []
    log_probs: list[float] | None = None
    start = first = time.perf_counter()
    cycles = first_tokens = 0
    failed = False
    for index, chunk in enumerate(map(jax.device_get, chunks)):
        count = int(chunk.counts[0])
        ids = chunk.tokens[0, :count].tolist()
        # The last token of a cycle is the target's own, as the very first is; those before it the draft proposed.
        own = 1 if index == 0 else 0
        for part, style in ((ids[:own], None), (ids[own:-1], DRAFTED), (ids[max(own, count - 1) :], None)):
            if part:
                console.out(detokenizer.add(part), style=style, end="", highlight=False)
        tokens += ids
        if chunk.log_probs is not None:
            log_probs = (log_probs or []) + chunk.log_probs[0, :count].tolist()
        failed = bool(chunk.failed[0])
        if index == 0:
            first, first_tokens = time.perf_counter(), count
        cycles += index > 0 or count > 1
        if detokenizer.stopped:
            break
    end = time.perf_counter()
    console.out(detokenizer.finish(), highlight=False)
    kept = len(detokenizer.ids)
    return Streamed(
        tokens[:kept],
        detokenizer.text,
        cycles,
        first_tokens,
        first - start,
        end - first,
        failed,
        None if log_probs is None else log_probs[:kept],
    )
