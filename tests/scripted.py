"""A stand-in for a running batch that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from eagle_jax.serving import Answer, Request


class ScriptedBatch:
    """Stands in for a `RunningBatch`. An answer gets `cycles` tokens a call, and counts as one cycle.

    requests: all so far. steps: calls of `advance`.

    Args:
      script: (prompt, key) -> an answer's tokens, and whether it then fails.
      die_at: the call of `advance` that raises KeyboardInterrupt.
    """

    def __init__(
        self,
        script: Callable[[Sequence[int], jax.Array], tuple[list[int], bool]],
        slots: int,
        stop_tokens: Sequence[int] = (),
        die_at: int | None = None,
    ):
        self.script, self.slots, self.stop_tokens, self.die_at = script, slots, stop_tokens, die_at
        self.free, self.finished, self.steps = list(range(slots)), [], 0
        self.requests: list[Request] = []
        self._left: dict[int, list[int]] = {}
        self._answers: dict[int, Answer] = {}

    @property
    def running(self) -> list[int]:
        return list(self._left)

    def insert(self, request: Request) -> int:
        slot = self.free.pop(0)
        self.requests.append(request)
        tokens, failed = self.script(request.prompt, request.key)
        self._left[slot] = tokens = tokens[: request.max_new_tokens]
        stopped = bool(tokens) and tokens[-1] in self.stop_tokens
        finish = "failed" if failed else "stop" if stopped else "length"
        self._answers[slot] = Answer(request, tokens, finish, cycles=1)
        return slot

    def advance(self, cycles: int):
        self.steps += 1
        if self.steps == self.die_at:
            raise KeyboardInterrupt
        for slot, left in self._left.items():
            request = self._answers[slot].request
            if left and request.on_tokens is not None:
                request.on_tokens(left[:cycles])
            self._left[slot] = left[cycles:]
            if not left[cycles:]:
                self.finished.append(slot)
        for slot in self.finished:
            del self._left[slot]

    def take(self, slot: int) -> Answer:
        self.finished = [other for other in self.finished if other != slot]
        self.free.append(slot)
        return self._answers.pop(slot)
