"""Detokenizer: streams text from token ids."""

from __future__ import annotations

from typing import Any

import numpy as np

REPLACEMENT = "\ufffd"  # a tokenizer's output for part of a character
MOST_PARTS = 3  # most replacement characters for one unfinished UTF-8 character
# Most tokens to hold back for an unfinished character. A character has four bytes at most, but the text may contain
# U+FFFD itself, which looks the same.
MOST_HELD = 16


class Detokenizer:
    """Decodes a text's token ids incrementally; the pieces joined equal the text decoded at once.

    A character is returned once all of its bytes have arrived. The cost per token is constant: only the tokens of the
    last complete piece and those after it are decoded.

    Args:
      tokenizer: of the transformers library, fast or slow.
      skip_special_tokens: whether to omit special tokens (end of sequence, chat headers).
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._restart()

    def add(self, ids: Any) -> str:
        """Returns the text that these ids complete; may be empty.

        Args:
          ids: a list of ints, or a one-dimensional array of any library; may be empty.
        Raises:
          ValueError: for an array of any other rank.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ValueError(f"ids must be those of one row, [T]; got shape {list(ids.shape)}")
        return "".join(self._add_one(int(one)) for one in ids)

    def finish(self) -> str:
        """Returns the rest of the text, with replacement characters for incomplete ones. Then starts a new text."""
        text = self._decode(self._before + self._held)
        left = text[len(self._given) :] if text.startswith(self._given) else self._decode(self._held)
        self._restart()
        return left

    def _restart(self) -> None:
        # Tokens that are decoded together: those of the last piece, as context (a SentencePiece tokenizer drops the
        # space before the first token), and those held back since. `_given` is the part of their text returned already.
        self._before: list[int] = []
        self._held: list[int] = []
        self._given = ""

    def _add_one(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._before + self._held)
        waits = text.endswith(REPLACEMENT) and len(self._held) <= MOST_HELD
        if not text.startswith(self._given):
            # Byte tokens after a complete character: all of it decodes to replacement characters until the next
            # character is complete.
            if waits:
                return ""
            # They form no character. Decode the held tokens without the returned text.
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
        """Drops the start of a long run of replacement characters if the rest decodes to the same text without it."""
        rest = self._held[-MOST_HELD:]
        # Without the invalid byte before them, bytes may decode to characters; also try without an unfinished last one.
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
