"""Answers many prompts by continuous batching: a sequence that ends makes room for the next prompt."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.cli.prompts import Conversation, Prompt
from eagle_jax.cli.rows import Rows
from eagle_jax.cli.text import Detokenizer, Ends, Finish

CYCLES = 4  # in one call: fewer leave a finished row idle for less time, more save round trips to the host
LATER_TURNS = np.uint32(2**31)  # turn t > 0 has the key fold_in(the first turn's, this + t), above any token's index


@dataclasses.dataclass(frozen=True)
class Rules:
    """Holds what all texts share.

    tokenizer: None if prompts are token ids. raw: see `encode`. room: above the length of any prompt.
    """

    tokenizer: Any
    raw: bool
    ends: Ends
    room: int


@dataclasses.dataclass
class Text:
    """Holds the answer to one turn; unfinished while `finish` is None.

    said: what the user says in this turn; None for token ids. prompt: the ids of all that comes before the answer.
    error: why it failed.
    """

    said: str | None
    prompt: Sequence[int]
    key: jax.Array
    detokenizer: Detokenizer
    log_probs: list[float] = dataclasses.field(default_factory=list)
    cycles: int = 0
    finish: Finish | None = None
    error: str | None = None

    def add(self, chunk: Any, row: int, ends: Ends) -> None:
        """Adds the new tokens of one row of a Chunk of NumPy arrays."""
        count = int(chunk.counts[row])
        self.detokenizer.collect(chunk.tokens[row, :count].tolist())
        if chunk.log_probs is not None:
            self.log_probs += chunk.log_probs[row, :count].tolist()
        if chunk.done[row]:
            self.detokenizer.finish()
        if chunk.done[row] or self.detokenizer.stopped:
            self.finish = ends.finish(self.detokenizer.ids, self.detokenizer.stopped, bool(chunk.failed[row]))
        if self.finish == "failed":
            self.error = "the model's logits became NaN or infinite"


class Job:
    """Holds one sample of a prompt: the answers to its turns, in order.

    texts: one for each turn begun; only the last may be unfinished.

    Args:
      index: of the prompt in its file. sample: its number among the prompt's samples.
      key: of the first turn.
    """

    def __init__(self, index: int, sample: int, prompt: Prompt, key: jax.Array, rules: Rules):
        self.index, self.sample, self.prompt, self.key, self.rules = index, sample, prompt, key, rules
        self.conversation = Conversation(rules.tokenizer, rules.raw)
        self.texts = [self._text(prompt.text, prompt.tokens, key)]
        if prompt.fault is not None:
            self._fail(prompt.fault)

    @property
    def done(self) -> bool:
        """Whether all turns have their answers."""
        return len(self.texts) == self.prompt.turns and self.texts[-1].finish is not None

    def go_on(self) -> None:
        """Starts the next turn, if the prompt has one."""
        last, turn = self.texts[-1], len(self.texts)
        if turn == self.prompt.turns:
            return
        said = self.prompt.later_turns[turn - 1]
        self.texts.append(self._text(said, [], jax.random.fold_in(self.key, LATER_TURNS + np.uint32(turn))))
        try:
            if last.finish == "failed":
                raise ValueError("the answer before it failed")
            assert last.said is not None
            self.conversation.add(last.said, last.detokenizer.text)
            tokens = self.texts[-1].prompt = self.conversation.tokens_with(said)
            if not 1 <= len(tokens) < self.rules.room:
                room = f"there is room for 1 to {self.rules.room - 1} and an answer"
                raise ValueError(f"the conversation has {len(tokens)} tokens, and {room}")
        except ValueError as error:
            self._fail(f"{self.prompt.where}, turn {turn + 1}: {error}")

    def _fail(self, error: str) -> None:
        """Marks the current turn as failed, and so all later ones."""
        self.texts[-1].finish, self.texts[-1].error = "failed", error
        self.go_on()

    def _text(self, said: str | None, prompt: Sequence[int], key: jax.Array) -> Text:
        return Text(said, prompt, key, Detokenizer(self.rules.tokenizer, self.rules.ends.strings))


def decode(rows: Rows, jobs: Iterable[Job], ends: Ends) -> Iterator[list[Job]]:
    """Yields, after each chunk, the jobs that it finished (maybe none); waiting jobs take their rows."""
    waiting, later_turns = iter(jobs), collections.deque[Job]()
    free = list(range(rows.state.done.shape[0]))
    running: dict[int, Job] = {}
    while True:
        ended = []
        while free and (job := later_turns.popleft() if later_turns else next(waiting, None)) is not None:
            if job.done:
                ended.append(job)
                continue
            running[row := free.pop(0)] = job
            rows.insert(row, job.texts[-1].prompt, job.texts[-1].key, ends.max_new_tokens)
        if not running:
            yield ended
            return
        chunk = rows.advance(CYCLES)
        cycles = rows.cycles
        for row, job in list(running.items()):
            text = job.texts[-1]
            text.add(chunk, row, ends)
            if text.finish is None:
                continue
            text.cycles = int(cycles[row])
            if not chunk.done[row]:
                rows.free(row)
            free.append(row)
            del running[row]
            job.go_on()
            if job.done:
                ended.append(job)
            else:
                later_turns.append(job)
        yield ended
