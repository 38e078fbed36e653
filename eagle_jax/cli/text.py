"""Shows tokens as text while they stream in, and says why a text ended."""

from __future__ import annotations

import argparse
import dataclasses
import io
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax

from eagle_jax import detokenizer
from eagle_jax.api import Chunk
from eagle_jax.files.prompts import check_text

DRAFTED = "green"  # the colour of text that the draft proposed

Finish: TypeAlias = Literal["stop", "length", "context", "failed", "interrupted"]
ENDED: dict[Finish, str] = {
    "stop": "ended at a stop token or string",
    "length": "ended by --max-new-tokens",
    "context": "ended by the context, which is full",
    "failed": "ended early",
    "interrupted": "interrupted",
}


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a text: stop strings, stop tokens, and the most new tokens."""

    strings: Sequence[str]
    tokens: tuple[int, ...]
    max_new_tokens: int

    def finish(self, ids: Sequence[int], stopped: bool, failed: bool) -> Finish:
        """Returns why a text of these new ids ended. stopped: by a string. failed: by NaN or infinite logits."""
        if stopped or (ids and ids[-1] in self.tokens):
            return "stop"
        if failed:
            return "failed"
        return "length" if len(ids) >= self.max_new_tokens else "context"


def stop_strings(args: argparse.Namespace) -> list[str]:
    """Returns those of --stop. Raises ValueError for an empty one, or one that is not UTF-8."""
    if "" in args.stop:
        raise ValueError("--stop: a stop string is empty")
    return [check_text("--stop", stop) for stop in args.stop]


def lenient(stream: Any) -> None:
    """Makes stdout replace characters that its encoding lacks by "?", instead of raising."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


class Detokenizer:
    """Decodes token ids to text up to a stop string; holds back a suffix that may begin one.

    The text ends just before the first occurrence of any stop string, however the ids are split into chunks. A stop
    string may hold special tokens, such as "<|end|>", although the text omits them.

    tokenizer: None collects ids only; there is no text then. ids: those of the text so far. Once a stop string has
    ended the text (`stopped`), the shortest prefix that completes it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        if "" in stops:
            raise ValueError("a stop string is empty")
        if stops and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none; use stop tokens")
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else detokenizer.Detokenizer(tokenizer)
        self._special = _special_tokens(tokenizer, stops)
        self._stops = [*stops, *(_with_special(stop, self._special.values()) for stop in stops)]
        self._longest = max(map(len, self._stops), default=1)
        self._placeholders = {ord(token.placeholder): None for token in self._special.values()}
        self._given: list[str] = []
        self._collected: list[int] = []
        self._held = ""  # text that may begin a stop string, with placeholders
        self.ids: list[int] = []
        self.stopped = False

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    @property
    def text(self) -> str:
        """The text returned so far."""
        return "".join(self._given)

    def add(self, ids: Sequence[int]) -> str:
        """Adds ids; returns the text that they make certain, which may be empty."""
        if not self._stops:
            self.ids += ids
            return self._give("" if self._stream is None else self._stream.add(ids))
        return "".join(map(self._add_one, ids))

    def collect(self, ids: Sequence[int]) -> None:
        """Adds ids without returning text; without stop strings, `finish` decodes them all at once."""
        if self._stops:
            self.add(ids)
        else:
            self.ids += ids
            self._collected += ids

    def finish(self) -> str:
        """Returns the remaining text, with a replacement character for an incomplete last character."""
        if self.stopped or self._stream is None:
            return ""
        if self._collected:
            ids, self._collected = self._collected, []
            return self._give(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return self._advance(self._stream.finish(), final=True)

    def _add_one(self, id: int) -> str:
        if self.stopped:
            return ""
        assert self._stream is not None
        self.ids.append(id)
        special = self._special.get(id)
        return self._advance(self._stream.add([id]) + ("" if special is None else special.placeholder), final=False)

    def _advance(self, new: str, final: bool) -> str:
        self._held += new
        end, self.stopped = self._end(final)
        certain, self._held = self._held[:end], self._held[end:]
        return self._give(certain.translate(self._placeholders))

    def _give(self, text: str) -> str:
        if text:
            self._given.append(text)
        return text

    def _end(self, final: bool) -> tuple[int, bool]:
        """Returns the length of the certain prefix of the held text, and whether a stop string follows it."""
        text = self._held
        found = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=len(text))
        if not final:  # a suffix of the text may be a prefix of a stop string
            for start in range(max(0, len(text) - self._longest + 1), found):
                if any(stop.startswith(text[start:]) for stop in self._stops):
                    return start, False
        return found, found < len(text)


@dataclasses.dataclass(frozen=True)
class _Special:
    """A special token of a stop string. placeholder: the character that stands for it; no text contains it."""

    content: str
    placeholder: str


def _special_tokens(tokenizer: Any, stops: Sequence[str]) -> dict[int, _Special]:
    """Returns the special tokens in the stop strings, by id: those that `decode` omits."""
    if not stops:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    contents = {id: str(token) for id, token in added if token.special}
    contents |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    held = {id: content for id, content in contents.items() if content and any(content in stop for stop in stops)}
    hidden = (id for id in sorted(held) if not tokenizer.decode([id], skip_special_tokens=True))
    # Lone surrogates: no tokenizer decodes to them.
    return {id: _Special(held[id], chr(0xD800 + number)) for number, id in enumerate(hidden)}


def _with_special(stop: str, special: Iterable[_Special]) -> str:
    """Replaces the special tokens of a stop string by their placeholders."""
    for token in sorted(special, key=lambda token: -len(token.content)):
        stop = stop.replace(token.content, token.placeholder)
    return stop


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A finished stream.

    text: without the stop string. tokens: up to the one that completed the stop string. finish: why the text ended.
    cycles: target passes after the prefill. first_tokens: number of tokens in the first chunk, which came after
    first_seconds. seconds: from then to the end. log_probs: of the tokens, if requested.
    """

    tokens: list[int]
    text: str
    finish: Finish
    cycles: int
    first_tokens: int
    first_seconds: float
    seconds: float
    log_probs: list[float] | None

    @property
    def failed(self) -> bool:
        """Whether the model's logits were NaN or infinite."""
        return self.finish == "failed"

    @property
    def summary(self) -> str:
        """One line of figures. The first token comes from the prefill and counts in the first figure only."""
        parts = [f"{len(self.tokens)} new tokens", f"{self.cycles} cycles"]
        if self.cycles and self.tokens:
            parts.append(f"{(len(self.tokens) - 1) / self.cycles:.2f} tokens a cycle")
        if len(self.tokens) > self.first_tokens:
            parts.append(f"{(len(self.tokens) - self.first_tokens) / self.seconds:.1f} tok/s")
        first = "token" if self.first_tokens <= 1 else f"{self.first_tokens} tokens"
        line = f"{', '.join(parts)} after the first {first}, which took {self.first_seconds:.2f} s"
        if self.log_probs:
            line += f"; mean log-probability {sum(self.log_probs) / len(self.log_probs):.4f}"
        return f"{line}; {ENDED[self.finish]}"


def show(chunks: Iterable[Chunk], tokenizer: Any, console: Any, ends: Ends) -> Streamed:
    """Prints one sequence's stream, one cycle a chunk; colours accepted draft tokens on a terminal.

    Args:
      chunks: the first holds the first new token, and may hold a cycle's. Iteration stops at the first stop string.
      console: a rich Console.
      ends: what ends the text.
    """
    shown = Detokenizer(tokenizer, ends.strings)
    log_probs: list[float] | None = None
    start = first = time.perf_counter()
    cycles = first_tokens = 0
    done = failed = False
    for index, chunk in enumerate(map(jax.device_get, chunks)):
        count = int(chunk.counts[0])
        ids = chunk.tokens[0, :count].tolist()
        # The first token of a text and the last of a cycle (the bonus) are the target's; the draft proposed the others.
        own = 1 if index == 0 else 0
        for part, style in ((ids[:own], None), (ids[own:-1], DRAFTED), (ids[max(own, count - 1) :], None)):
            if part:
                console.out(shown.add(part), style=style, end="", highlight=False)
        if chunk.log_probs is not None:
            log_probs = (log_probs or []) + chunk.log_probs[0, :count].tolist()
        done, failed = bool(chunk.done[0]), bool(chunk.failed[0])
        if index == 0:
            first, first_tokens = time.perf_counter(), count
        cycles += index > 0 or count > 1
        if shown.stopped:
            break
    end = time.perf_counter()
    console.out(shown.finish(), highlight=False)
    kept = shown.ids
    return Streamed(
        tokens=kept,
        text=shown.text,
        finish=ends.finish(kept, shown.stopped, failed) if done or shown.stopped else "interrupted",
        cycles=cycles,
        first_tokens=first_tokens,
        first_seconds=first - start,
        seconds=end - first,
        log_probs=None if log_probs is None else log_probs[: len(kept)],
    )
