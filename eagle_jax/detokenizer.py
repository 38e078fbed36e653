"""Detokenizer: token ids to text while they come."""

from __future__ import annotations

from typing import Any

import numpy as np

REPLACEMENT = "\ufffd"  # what a tokenizer decodes a part of a character to
MOST_PARTS = 3  # replacement characters that one unfinished UTF-8 character can come out as
# Tokens that are held back without a whole character at their end. A character takes four at most, but U+FFFD may also
# be what a text says, and looks the same.
MOST_HELD = 16


class Detokenizer:
    """Decodes one text's token ids piece by piece; the pieces joined are the text decoded at once.

    A character is given out once all of its bytes are there. The work per token does not grow with the text: only the
    tokens since the last whole piece, and those of that piece, are decoded.

    Args:
      tokenizer: of the transformers library, fast or slow.
      skip_special_tokens: whether special tokens (end of sequence, headers of a chat) are left out.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._restart()

    def add(self, ids: Any) -> str:
        """Returns the text that is certain with these further ids; may be empty.

        Args:
          ids: a list of ints, or an array [T] of any library; T may be 0.
        Raises:
          ValueError: for ids of several rows.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ValueError(f"ids must be those of one row, [T]; got shape {list(ids.shape)}")
        return "".join(self._add_one(int(one)) for one in ids)

    def finish(self) -> str:
        """Returns what is left, a replacement character for each part of one; a further `add` begins a new text."""
        text = self._decode(self._before + self._held)
        left = text[len(self._given) :] if text.startswith(self._given) else self._decode(self._held)
        self._restart()
        return left

    def _restart(self) -> None:
        # The tokens decoded together: those of the last piece, for the context (a SentencePiece tokenizer drops the
        # space before the first token), and those held since. `_given`: what of their text was given out already.
        self._before: list[int] = []
        self._held: list[int] = []
        self._given = ""

    def _add_one(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._before + self._held)
        waits = text.endswith(REPLACEMENT) and len(self._held) <= MOST_HELD
        if not text.startswith(self._given):
            # Byte tokens behind a whole character: all decode to replacement characters until the next one is whole.
            if waits:
                return ""
            # They make no character. What was given out stays; the rest is decoded by itself.
            self._before, self._given = [], ""
            text = self._decode(self._held)
        unsure = len(text) - len(text.rstrip(REPLACEMENT))
        end = max(len(text) - (unsure if waits else min(unsure, MOST_PARTS)), len(self._given))
        new = text[len(self._given) : end]
        if new and not unsure:
            self._before, self._held = self._held, []
            text = self._decode(self._before)
            end = len(text)
        self._given = text[:end]
        if len(self._held) >= 2 * MOST_HELD and len(self._held) % MOST_HELD == 0:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        """Drops the beginning of a long run of replacement characters, if the rest reads the same without it."""
        rest = self._held[-MOST_HELD:]
        # Bytes may be characters without a broken one before them, if not these then without an unfinished last one.
        parts = [self._decode(rest[: MOST_HELD - cut]) for cut in range(MOST_PARTS + 1)]
        expected = len(text) - len(self._decode(self._before + self._held[:-MOST_HELD]))
        same = all(part.endswith(REPLACEMENT) and abs(len(part) - expected) <= 2 * MOST_PARTS for part in parts)
        waiting = len(text) - len(self._given)
        if same and text.endswith(parts[0]) and len(parts[0]) > waiting:
            self._before, self._held, self._given = [], rest, parts[0][: len(parts[0]) - waiting]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )
