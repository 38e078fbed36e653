"""Plain and speculative decoding in turn on the same prompts: timing and comparison.

Letters: B batch, P padded prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.api import Output, forward, generate, trained_capacity
from eagle_jax.measure.statistics import distinct_ngrams
from eagle_jax.models.llama import Llama
from eagle_jax.prompt import pad
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import TreePolicy

NEAR_TIE = 1e-4  # logits this close may change places between a pass of one token and one of many, in float32
FIRST_RANGE = 256  # positions: the first range of `Comparison.by_position`


@dataclasses.dataclass(frozen=True)
class Result:
    """One way of decoding over all prompts.

    tokens: the new tokens of each row, in order; drafted: which of them the draft proposed. cycles: target passes after
    the prefill, summed over rows. accepted: how many cycles accepted 0, 1, ... draft tokens. steps: passes that the
    device ran, the prefills too; less than cycles in a batch, where one pass serves every row. seconds: of all calls.
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
        return (self.new_tokens - len(self.tokens)) / max(self.cycles, 1)

    @property
    def ms_a_pass(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.new_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two decodings of a row part: at its new token `index` (from 0). A row that ended there has None.

    gap: by how much the target's logit of the lesser token falls short of the best one; None where a row ended, or
    where more than the logits chose.
    """

    row: int
    index: int
    plain: int | None
    speculative: int | None
    gap: float | None

    @property
    def near_tie(self) -> bool:
        return self.gap is not None and self.gap < NEAR_TIE

    def __str__(self) -> str:
        gap = "" if self.gap is None else f"; the lesser logit is {self.gap:.2g} below the best"
        place = f"prompt {self.row + 1}, new token {self.index + 1}"
        return f"{place}: plain {self.plain}, speculative {self.speculative}{gap}"


@dataclasses.dataclass(frozen=True)
class Range:
    """Positions start to end - 1 of all texts: their new tokens, and those that were the target's own, one a cycle."""

    start: int
    end: int
    tokens: int
    own: int

    @property
    def tokens_a_pass(self) -> float | None:
        """None if no cycle ended here."""
        return self.tokens / self.own if self.own else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both decodings of the same prompts, of these lengths, and where each differing row first differs.

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
        """Rows that are equal token for token."""
        return None if self.differences is None else len(self.plain.tokens) - len(self.differences)

    @property
    def by_position(self) -> list[Range]:
        return by_position(self.speculative, self.prompt_lengths)


def by_position(result: Result, prompt_lengths: Sequence[int]) -> list[Range]:
    """A result's texts in ranges of positions, prompt included, each twice as long as the one before."""
    texts = list(zip(prompt_lengths, result.drafted, strict=True))
    # Without each text's first token, which comes from the prompt's pass.
    drafted = np.concatenate([np.asarray(flags[1:], bool) for _, flags in texts])
    places = np.concatenate([length + 1 + np.arange(len(flags[1:])) for length, flags in texts])
    found = []
    start, end = 0, FIRST_RANGE
    while (places >= start).any():
        inside = drafted[(places >= start) & (places < end)]
        if len(inside):
            found.append(Range(start, end, len(inside), int((~inside).sum())))
        start, end = end, 2 * end
    return found


def compare(
    target: Llama, draft: Any, token_lists: Sequence[Sequence[int]], *, tree: TreePolicy, **options: Any
) -> Comparison:
    """Decodes the prompts plain and speculative in turn; options as in `decode_in_turn`."""
    methods = {"plain": (None, tree), "speculative": (draft, tree)}
    results, rows = decode_in_turn(target, methods, token_lists, **options)
    plain, speculative = results["plain"], results["speculative"]
    return Comparison(
        plain, speculative, list(map(len, rows)), differences(target, rows, plain, speculative, **options)
    )


def decode_in_turn(
    target: Llama,
    methods: Mapping[str, tuple[Any, TreePolicy]],
    token_lists: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampling: SamplingConfig = SamplingConfig(),
    key: jax.Array | None = None,
    batch: int = 1,
    repeats: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Result], list[Sequence[int]]]:
    """Decodes the prompts in batches, by every method in turn, and takes each batch's median times.

    Args:
      methods: {name: (draft or None, tree)}.
      sampling, key: as in `generate`; every batch has the same key.
      batch: rows a call; the last call is filled up with the first prompts.
      progress: called after every call of `generate`, repeats + 1 times a batch and method; the first compile.
    Returns:
      {name: Result}, and the prompt of every row.
    """
    count = -(-len(token_lists) // batch) * batch
    rows = [token_lists[i % len(token_lists)] for i in range(count)]
    parts: dict[str, list[Result]] = {name: [] for name in methods}
    for start in range(0, count, batch):
        tokens, lengths = pad(rows[start : start + batch])
        runs = {
            name: functools.partial(
                generate,
                target,
                draft,
                tokens,
                lengths,
                key=key,
                tree=tree,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens,
                capacity=trained_capacity(target, int(lengths.max()), tokens.shape[1], max_new_tokens),
            )
            for name, (draft, tree) in methods.items()
        }
        outputs: dict[str, Output] = {}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for name, run in runs.items():
            outputs[name] = jax.device_get(run())
            progress()
        for _ in range(repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - began)
                progress()
        for name, output in outputs.items():
            parts[name].append(_result(output, jax.device_get(lengths), statistics.median(seconds[name])))
    return {name: _sum(found) for name, found in parts.items()}, rows


def differences(
    target: Llama,
    rows: Sequence[Sequence[int]],
    plain: Result,
    speculative: Result,
    *,
    sampling: SamplingConfig = SamplingConfig(),
    **_: Any,
) -> list[Difference] | None:
    """Where the texts of the rows first differ; None where they may by chance."""
    if sampling.temperature != 0 and not sampling.coupled:
        return None
    return _differences(target if sampling.greedy else None, rows, plain.tokens, speculative.tokens)


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


def _differences(
    target: Llama | None, rows: Sequence[Sequence[int]], plain: list[list[int]], speculative: list[list[int]]
) -> list[Difference]:
    """Where rows differ, with gaps if there is a target: its logits tell one only where nothing else chose."""
    found = []
    for row, (one, two) in enumerate(zip(plain, speculative, strict=True)):
        if one == two:
            continue
        index = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        if index < min(len(one), len(two)):
            gap = None if target is None else _gap(target, [*rows[row], *one[:index]], [one[index], two[index]])
            found.append(Difference(row, index, one[index], two[index], gap))
        else:  # the shorter one ended here
            rest = [tokens[index] if index < len(tokens) else None for tokens in (one, two)]
            found.append(Difference(row, index, rest[0], rest[1], None))
    return found


def _gap(target: Llama, before: list[int], pair: list[int]) -> float:
    """How far the lesser of two tokens' logits falls short of the best logit after the tokens `before`."""
    logits, _ = forward(target, *pad([before]))
    last = np.asarray(logits[0, len(before) - 1])
    return float(last.max() - last[np.asarray(pair)].min())
