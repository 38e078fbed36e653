"""Decodes the same prompts by several methods in turn: texts, times, and where the texts differ."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.api import Output, generate
from eagle_jax.decode.plan import plan
from eagle_jax.decode.prefill import pad, prefill
from eagle_jax.drafts.protocol import Draft
from eagle_jax.measure.near_tie import Difference, differences
from eagle_jax.measure.phases import RUNS, Phases, measure_phases
from eagle_jax.measure.statistics import Range, accepted_shares, by_position, distinct_ngrams, tokens_a_cycle
from eagle_jax.measure.timing import timed
from eagle_jax.models.target import Target
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import TreePolicy

Methods = Mapping[str, tuple[Draft | None, TreePolicy]]  # by name: plain decoding has no draft, and ignores the tree


@dataclasses.dataclass(frozen=True)
class Result:
    """The texts and times of one method over all prompts.

    tokens: the new tokens of each sequence, in order; drafted: which of them the draft proposed. cycles: target passes
    after the prefill, summed over sequences. accepted: how many cycles accepted 0, 1, ... draft tokens. steps: passes
    that the device ran, prefills included; fewer than cycles in a batch, where one pass serves every sequence.
    seconds: of all calls. failed: sequences that ended in NaN or infinite logits.
    """

    tokens: list[list[int]]
    drafted: list[list[bool]]
    cycles: int
    accepted: list[int]
    steps: int
    seconds: float
    failed: int

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def distinct_4grams(self) -> float:
        """The share of distinct 4-grams in a text, the mean over texts."""
        return distinct_ngrams(self.tokens)

    @property
    def tokens_a_pass(self) -> float:
        return tokens_a_cycle(self.new_tokens, len(self.tokens), self.cycles)

    @property
    def accepted_at(self) -> list[float]:
        """The share of cycles whose draft token 1, 2, ... was accepted."""
        return accepted_shares(self.accepted)

    @property
    def ms_a_pass(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.new_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Plain and speculative decoding of the same prompts, and where each differing sequence first differs.

    differences: None where texts may differ by chance: two samples, unless they are coupled.
    """

    plain: Result
    speculative: Result
    prompt_lengths: list[int]
    differences: list[Difference] | None

    @property
    def ratio(self) -> float:
        return self.speculative.rate / self.plain.rate

    @property
    def identical(self) -> int | None:
        """How many sequences are equal token for token."""
        return None if self.differences is None else len(self.plain.tokens) - len(self.differences)

    @property
    def by_position(self) -> list[Range]:
        return by_position(self.speculative.drafted, self.prompt_lengths)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One of several methods: its texts and times, compared with plain decoding.

    ratio: of its rate to plain decoding's. differences: from the plain texts; None where texts may differ by chance.
    Both are None if plain decoding was not measured.
    """

    name: str
    result: Result
    phases: Phases
    ratio: float | None
    differences: list[Difference] | None
    by_position: list[Range]

    @property
    def identical(self) -> int | None:
        """How many sequences are equal to the plain ones token for token."""
        return None if self.differences is None else len(self.result.tokens) - len(self.differences)


def compare(
    target: Target,
    draft: Any,
    token_lists: Sequence[Sequence[int]],
    *,
    tree: TreePolicy,
    sampling: SamplingConfig = SamplingConfig(),
    **options: Any,
) -> Comparison:
    """Decodes the prompts plain and speculative in turn; options as in `decode_in_turn`."""
    methods = {"plain": (None, tree), "speculative": (draft, tree)}
    results, prompts = decode_in_turn(target, methods, token_lists, sampling=sampling, **options)
    plain, speculative = results["plain"], results["speculative"]
    found = differences(target, prompts, plain.tokens, speculative.tokens, sampling)
    return Comparison(plain, speculative, list(map(len, prompts)), found)


def compare_several(
    target: Target,
    methods: Methods,
    token_lists: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    batch: int = 1,
    repeats: int = 1,
    progress: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Measured]:
    """Decodes the prompts by every method in turn, then times the phases of a cycle, greedy, on the first batch.

    Args:
      progress: called as by `decode_in_turn`, and once more a method. Other arguments as there.
    """
    shared: dict[str, Any] = {"batch": batch, "repeats": repeats, "progress": progress, "sampling": sampling}
    results, prompts = decode_in_turn(target, methods, token_lists, **shared, **options)
    plain = next((results[name] for name, (draft, _) in methods.items() if draft is None), None)
    lengths = list(map(len, prompts))
    found = []
    for name, (draft, tree) in methods.items():
        result = results[name]
        phases = _phases(target, draft, tree, prompts[:batch], repeats)
        progress()
        ratio = parted = None
        if plain is not None:
            ratio = result.rate / plain.rate
            parted = differences(target, prompts, plain.tokens, result.tokens, sampling)
        found.append(Measured(name, result, phases, ratio, parted, by_position(result.drafted, lengths)))
    return found


def _phases(
    target: Target, draft: Draft | None, tree: TreePolicy, prompts: Sequence[Sequence[int]], repeats: int
) -> Phases:
    depth = 0 if draft is None else draft.depth(tree)
    room = (RUNS + 1) * (depth + 1)
    start = jax.jit(prefill, static_argnames=("max_new_tokens", "tree"))
    state = start(target, draft, *pad(prompts), max_new_tokens=room, tree=tree)
    return measure_phases(target, draft, tree, state, repeats)


def decode_in_turn(
    target: Target,
    methods: Methods,
    token_lists: Sequence[Sequence[int]],
    *,
    batch: int = 1,
    repeats: int = 1,
    progress: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[dict[str, Result], list[Sequence[int]]]:
    """Decodes the prompts in batches, by every method in turn, and takes each batch's median times.

    Args:
      batch: sequences a call; the last call is filled up with the first prompts.
      progress: called after every call of `generate`, repeats + 1 times a batch and method; the first compile.
      options: max_new_tokens, stop_tokens, sampling and key, as in `generate`; every batch has the same key.
    Returns:
      {name: Result}, and the prompt of every sequence.
    """
    count = -(-len(token_lists) // batch) * batch
    prompts = [token_lists[i % len(token_lists)] for i in range(count)]
    parts: dict[str, list[Result]] = {name: [] for name in methods}
    for start in range(0, count, batch):
        tokens, lengths = pad(prompts[start : start + batch])
        trained = target.config.max_position_embeddings
        room = plan(tokens.shape[1], options["max_new_tokens"], trained=trained, longest=int(lengths.max())).capacity
        calls = {
            name: functools.partial(generate, target, draft, tokens, lengths, tree=tree, capacity=room, **options)
            for name, (draft, tree) in methods.items()
        }
        for name, (output, seconds) in _call_in_turn(calls, repeats, progress).items():
            parts[name].append(_result(output, jax.device_get(lengths), seconds))
    return {name: _sum(found) for name, found in parts.items()}, prompts


def _call_in_turn(
    calls: Mapping[str, Callable[[], Output]], repeats: int, progress: Callable[[], None]
) -> dict[str, tuple[Output, float]]:
    """Returns each call's output, on the host, and its median seconds without compilation."""
    outputs = {}
    for name, call in calls.items():
        outputs[name] = jax.device_get(call())
        progress()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call)[0])
            progress()
    return {name: (outputs[name], statistics.median(seconds[name])) for name in calls}


def _result(output: Output, prompt_lengths: np.ndarray, seconds: float) -> Result:
    ends = prompt_lengths, output.lengths
    return Result(
        tokens=[row[start:end].tolist() for row, start, end in zip(output.tokens, *ends, strict=True)],
        drafted=[row[start:end].tolist() for row, start, end in zip(output.drafted, *ends, strict=True)],
        cycles=int(output.cycles.sum()),
        accepted=output.accepted.sum(0).tolist(),
        steps=1 + int(output.cycles.max()),
        seconds=seconds,
        failed=int(output.failed.sum()),
    )


def _sum(results: list[Result]) -> Result:
    return Result(
        tokens=[row for result in results for row in result.tokens],
        drafted=[row for result in results for row in result.drafted],
        cycles=sum(result.cycles for result in results),
        accepted=np.sum([result.accepted for result in results], axis=0).tolist(),
        steps=sum(result.steps for result in results),
        seconds=sum(result.seconds for result in results),
        failed=sum(result.failed for result in results),
    )
