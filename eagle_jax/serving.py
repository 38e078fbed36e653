"""Serving with continuous batching: a running batch whose slots take the next request as soon as they are free.

    batch = RunningBatch(target, draft, slots=8, capacity=2048, stop_tokens=(2,))
    for answer in serve(batch, [Request([1, 15, 7], max_new_tokens=64), Request([1, 42])]):  # as they finish
        print(answer.request.prompt, answer.tokens, answer.finish)

An answer depends on its request only, not on its slot, on other requests, or on the order in which they arrive.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from eagle_jax.api import Chunk
from eagle_jax.api import advance as advance_state
from eagle_jax.decode.insert import insert
from eagle_jax.decode.plan import padded_width
from eagle_jax.decode.prefill import BUCKETS, reusable
from eagle_jax.decode.state import empty_state
from eagle_jax.drafts.protocol import Draft, check_models
from eagle_jax.models.target import Target
from eagle_jax.sampling import RANGES, SamplingConfig
from eagle_jax.tree import TreeConfig, TreePolicy

CYCLES = 4  # per call of `advance`: fewer leave a finished slot idle for less time, more save host round trips
Result = TypeVar("Result")
# Why an answer ended. stop: a stop token. length: max_new_tokens. context: the batch's capacity. failed: NaN or
# infinite logits of the target. cancelled: by `on_tokens`, or by `take` while it was running.
Finish: TypeAlias = Literal["stop", "length", "context", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    prompt: 1 to capacity - 1 token ids.
    key: the token at index n is drawn with fold_in(key, n). Not needed in a greedy batch.
    max_new_tokens: None for as many as the capacity leaves.
    sampling: with one number a field; None for the batch's.
    stop_tokens: ids that end this answer, in addition to the batch's.
    on_tokens: called with the answer's new tokens after every `advance` that added some; ends the answer if it returns
      True. Use it for streaming, stop strings and cancelling.
    id: any value; not read.
    """

    prompt: Sequence[int]
    key: Key[Array, ""] | None = None
    max_new_tokens: int | None = None
    sampling: SamplingConfig | None = None
    stop_tokens: Sequence[int] = ()
    on_tokens: Callable[[list[int]], bool | None] | None = None
    id: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a request.

    tokens: the new tokens, including a final stop token.
    finish: why it ended, see `Finish`.
    cycles: target passes after the prefill.
    reused: prompt tokens that the slot's cache held already.
    log_probs: of the new tokens, if the batch records them.
    """

    request: Request
    tokens: list[int]
    finish: Finish
    cycles: int
    reused: int = 0
    log_probs: list[float] | None = None


@dataclasses.dataclass
class _Growing:
    """An answer in a slot. text: all new tokens of the slot's sequence. done: whether that has ended."""

    request: Request
    reused: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    text: list[int] = dataclasses.field(default_factory=list)
    done: bool = False
    finish: Finish | None = None


_insert = jax.jit(insert, static_argnames="reuse", donate_argnames="state")
_set = jax.jit(lambda flags, index: flags.at[index].set(True), donate_argnums=0)


class RunningBatch:
    """A decoding state of fixed shape whose sequences start and end independently.

    A service compiles one program for `advance` (per number of cycles) and one per width of padded prompts.

    slots: number of concurrent sequences.
    longest_prompt: most tokens of a request's prompt.
    state: the `DecodeState`, which every call donates and replaces.

    Args:
      target, draft, tree: as in `generate`; draft=None is plain decoding. The batch is on their mesh, if any.
      capacity: most tokens (prompt + new) of a slot.
      sampling: of requests without one, with one number a field. The default is a greedy batch, which takes greedy
        requests only; in any other batch a request may have temperature 0.
      stop_tokens: ids that end every answer.
      log_probs: whether to record log-probabilities under the target's unprocessed distribution.
      buckets: widths to pad prompts to.
      reuse: reuse the cached positions of the common prefix of a slot's old text and the new prompt, as in a
        conversation. Logits differ by rounding, as other passes computed the prefix.
    Raises:
      ValueError: for invalid arguments, or a capacity that exceeds the memory.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        *,
        slots: int,
        capacity: int,
        tree: TreePolicy = TreeConfig(),
        sampling: SamplingConfig = SamplingConfig(),
        stop_tokens: Sequence[int] = (),
        log_probs: bool = False,
        buckets: Sequence[int] = BUCKETS,
        reuse: bool = False,
    ):
        if type(slots) is not int or slots < 1:
            raise ValueError(f"slots must be a positive integer, got {slots!r}")
        check_models(target, draft)
        _check_ids("stop_tokens", stop_tokens, target.config.vocab_size)
        sampling.check(1, target.config.vocab_size)
        if draft is not None:
            draft.check_fits(target)
        self.target, self.draft, self.tree = target, draft, None if draft is None else tree
        self.slots, self.capacity, self.buckets = slots, capacity, tuple(buckets)
        self.longest_prompt = min(capacity - 1, max(buckets))
        self.sampling, self.stop_tokens = sampling, tuple(stop_tokens)
        self.reuse = reuse and reusable(target, draft)

        # Under jit each device allocates its own shard; the models are arguments only for their mesh.
        @functools.partial(jax.jit, keep_unused=True)
        def start(target, draft):
            return empty_state(
                target,
                draft,
                slots,
                capacity,
                tree=self.tree,
                sampling=sampling,
                stop_tokens=self.stop_tokens,
                log_probs=log_probs,
            )

        self.state = start(target, draft)
        self._growing: dict[int, _Growing] = {}  # by slot
        self._free = list(range(slots))  # in the order in which they became free
        self._texts: list[Sequence[int]] = [()] * slots  # the text in each free slot's cache

    @property
    def free(self) -> list[int]:
        """Slots that can take a request."""
        return list(self._free)

    @property
    def running(self) -> list[int]:
        """Slots with unfinished answers."""
        return [slot for slot, growing in self._growing.items() if growing.finish is None]

    @property
    def finished(self) -> list[int]:
        """Slots with finished answers, in the order of their requests."""
        return [slot for slot, growing in self._growing.items() if growing.finish is not None]

    def compile(self, cycles: int = CYCLES) -> None:
        """Compiles the programs of an empty batch in advance, by running a prompt of one token in slot 0."""
        _check_empty(self)
        self._write(0, Request([0], jax.random.key(0), max_new_tokens=1))
        self._run(cycles)
        self._end(0)

    def check(self, request: Request) -> None:
        """Raises ValueError, naming the field and what it may be, for a request that this batch cannot take."""
        vocab, most = self.target.config.vocab_size, self.longest_prompt
        if not 1 <= len(request.prompt) <= most:
            raise ValueError(f"the prompt has {len(request.prompt)} tokens; this batch takes 1 to {most}")
        _check_ids("prompt", request.prompt, vocab)
        _check_ids("stop_tokens", request.stop_tokens, vocab)
        new = request.max_new_tokens
        if new is not None and (type(new) is not int or new < 1):
            raise ValueError(f"max_new_tokens must be a positive integer, got {new!r}")
        sampling = request.sampling
        if self.sampling.greedy:
            if sampling is not None and not sampling.greedy:
                raise ValueError("this batch is greedy: for requests that sample, give it a sampling of its own")
            return
        key = request.key
        if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim != 0:
            raise ValueError("key must be one typed key, such as jax.random.key(0), in a batch that samples")
        if sampling is not None:
            sampling.check(1, vocab)
            biased = sampling.logit_bias is not None, self.sampling.logit_bias is not None
            if biased[0] != biased[1] or sampling.coupled != self.sampling.coupled:
                raise ValueError(
                    "a request's sampling must have a logit_bias, or be coupled, just where the batch's is"
                )

    def insert(self, request: Request) -> int:
        """Inserts a request into a free slot and returns the slot. The next `advance` runs the prompt.

        With `reuse`, chooses the slot whose text has the longest common prefix with the prompt.

        Raises:
          ValueError: as `check`, and if no slot is free.
        """
        self.check(request)
        if not self._free:
            raise ValueError("no slot is free: advance, and take what is finished")
        slot = self._free[0]
        if self.reuse:
            slot = max(self._free, key=lambda slot: _common(self._texts[slot], request.prompt))
        self._free.remove(slot)
        self._growing[slot] = _Growing(request, self._write(slot, request))
        return slot

    def advance(self, cycles: int = CYCLES) -> Chunk:
        """Runs pending prompts and up to `cycles` cycles, then calls each request's `on_tokens`.

        Returns:
          The new tokens of all slots as NumPy arrays, including those after an answer's end.
        """
        chunk = self._run(cycles)
        for slot, growing in self._growing.items():
            if growing.finish is None:
                self._add(growing, chunk, slot)
        return chunk

    def take(self, slot: int) -> Answer:
        """Returns a slot's answer and frees the slot. Cancels an unfinished answer."""
        if slot not in self._growing:
            raise ValueError(f"slot {slot} holds no request; {list(self._growing)} do")
        growing = self._growing.pop(slot)
        if not growing.done:  # otherwise `advance` would continue its sequence
            self._end(slot)
        self._texts[slot] = () if growing.finish == "failed" else [*growing.request.prompt, *growing.text]
        self._free.append(slot)
        return Answer(
            request=growing.request,
            tokens=growing.tokens,
            finish=growing.finish or "cancelled",
            cycles=int(jax.device_get(self.state.cycles)[slot]),
            reused=growing.reused,
            log_probs=None if self.state.log_probs is None else growing.log_probs,
        )

    def clear(self) -> None:
        """Drops all requests."""
        for slot in list(self._growing):
            self.take(slot)

    def _add(self, growing: _Growing, chunk: Chunk, slot: int) -> None:
        """Appends a slot's new tokens to its answer, and sets `finish` if it has ended."""
        request = growing.request
        new = chunk.tokens[slot, : chunk.counts[slot]].tolist()
        growing.text += new
        growing.done = bool(chunk.done[slot])
        stop = next((index for index, token in enumerate(new) if token in request.stop_tokens), None)
        if stop is not None:
            new = new[: stop + 1]
        growing.tokens += new
        if chunk.log_probs is not None:
            growing.log_probs += chunk.log_probs[slot, : len(new)].tolist()
        if stop is not None or (growing.tokens and growing.tokens[-1] in self.stop_tokens):
            growing.finish = "stop"
        elif chunk.failed[slot]:
            growing.finish = "failed"
        elif growing.done:
            full = request.max_new_tokens is None or len(growing.tokens) < request.max_new_tokens
            growing.finish = "context" if full else "length"
        if new and request.on_tokens is not None and request.on_tokens(new) and growing.finish is None:
            growing.finish = "cancelled"

    def _write(self, slot: int, request: Request) -> int:
        """Writes a request into the state; returns how many cached positions it reuses."""
        samples = self.state.sampling is not None
        new = self.capacity if request.max_new_tokens is None else request.max_new_tokens
        length = len(request.prompt)
        tokens = np.zeros(padded_width(length, self.buckets), np.int32)
        tokens[:length] = request.prompt
        self.state = _insert(
            self.state,
            slot,
            tokens,
            length,
            request.key if samples else None,
            max_new_tokens=min(new, self.capacity),  # int32 on the device
            sampling=_as_arrays(request.sampling or self.sampling) if samples else None,
            reuse=self.reuse,
        )
        return int(jax.device_get(self.state.cache.length)[slot]) if self.reuse else 0

    def _run(self, cycles: int) -> Chunk:
        self.state, chunk = advance_state(self.target, self.draft, self.state, tree=self.tree, cycles=cycles)
        return jax.device_get(chunk)

    def _end(self, slot: int) -> None:
        self.state = dataclasses.replace(self.state, done=_set(self.state.done, slot))


def _check_empty(batch: RunningBatch) -> None:
    if held := batch.running + batch.finished:
        raise ValueError(f"slots {held} hold requests; clear() drops them")


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    tokens = np.asarray(ids, None if len(ids) else int)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{name} must be token ids, got {tokens.dtype}{list(tokens.shape)}")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise ValueError(f"{name}: token {outside[0]} is outside the vocabulary, 0 to {vocab_size - 1}")


def _as_arrays(sampling: SamplingConfig) -> SamplingConfig:
    """Converts the fields to arrays of fixed shapes and dtypes, so that all requests share one compiled program."""
    numbers = {
        name: np.full(1, getattr(sampling, name), np.int32 if name == "top_k" else np.float32) for name in RANGES
    }
    bias = sampling.logit_bias
    bias = None if bias is None else np.asarray(bias, np.float32).reshape(1, -1)
    return SamplingConfig(**numbers, logit_bias=bias, coupled=sampling.coupled)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


# A task yields a request, is sent its answer, and so on; it returns its result.
Task: TypeAlias = Generator[Request, Answer, Result]


def run(batch: RunningBatch, tasks: Iterable[Task[Result] | None], *, cycles: int = CYCLES) -> Iterator[Result]:
    """Runs tasks of several requests each, such as conversations, concurrently; yields their results as they end.

    A task is a generator that yields a Request and is sent its Answer, any number of times, and returns its result.
    Requests of started tasks take precedence over new tasks.

    Args:
      batch: empty. Requests that are still running when the caller leaves the loop are dropped.
      tasks: the next one is requested whenever a slot is free. None means that none is available now: the loop advances
        the running tasks and asks again. It ends when none is available and none is running.
      cycles: per call of `advance`.
    Raises:
      ValueError: for a request that the batch cannot take (see `RunningBatch.check`), or a batch that is not empty.
    """
    _check_empty(batch)
    arriving, answered = iter(tasks), collections.deque[tuple[Task[Result], Answer]]()
    running: dict[int, Task[Result]] = {}
    try:
        while True:
            while batch.free:
                try:
                    if answered:
                        task, answer = answered.popleft()
                        request = task.send(answer)
                    elif (new := next(arriving, None)) is not None:
                        task, request = new, next(new)
                    else:
                        break
                except StopIteration as end:
                    yield end.value
                else:
                    running[batch.insert(request)] = task
            if not running:
                return
            batch.advance(cycles)
            answered.extend((running.pop(slot), batch.take(slot)) for slot in batch.finished)
    except GeneratorExit:
        batch.clear()
        raise


def serve(batch: RunningBatch, requests: Iterable[Request | None], *, cycles: int = CYCLES) -> Iterator[Answer]:
    """Answers requests, as many concurrently as the batch has slots; yields the answers as they end.

    Args:
      requests: the next one is requested whenever a slot is free. None means that none is available now (see `run`).
      batch, cycles: as in `run`, as are the errors.
    """

    def ask(request: Request) -> Task[Answer]:
        return (yield request)

    return run(batch, (None if request is None else ask(request) for request in requests), cycles=cycles)
