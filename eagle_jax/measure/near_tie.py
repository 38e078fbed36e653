"""Near-ties: logits so close that rounding decides which token greedy decoding writes.

A pass of one token and a pass of many round differently. So greedy plain and speculative texts may part at a near-tie,
and nowhere else. How close the two tokens were is measured on the target's logits at the first difference.

Letters: V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from eagle_jax.api import forward
from eagle_jax.decode.prefill import BUCKETS, pad
from eagle_jax.models.target import Target
from eagle_jax.sampling import SamplingConfig

# By the dtype of the target's weights. Absolute margins suit logits of known size, at most about 32: from 16 to 32 a
# bfloat16 is a multiple of 1/8. Relative margins, to the largest logit, suit any target: 2**-5 is eight roundings of
# bfloat16, each of 2**-8 at most.
ABSOLUTE_MARGIN = {"float32": 1e-4, "bfloat16": 2**-3}
RELATIVE_MARGIN = {"float32": 1e-4, "bfloat16": 2**-5}


def absolute_gap(logits: np.ndarray, tokens: Sequence[int]) -> float:
    """Returns by how much the lowest logit of `tokens` falls short of the best of all logits [V]."""
    return float(logits.max() - logits[np.asarray(tokens)].min())


def relative_gap(logits: np.ndarray, tokens: Sequence[int]) -> float:
    """Returns `absolute_gap` as a share of the largest magnitude among the logits [V]."""
    return absolute_gap(logits, tokens) / float(np.abs(logits).max())


def near_tie_absolute(gap: float, dtype: str = "float32") -> bool:
    """Returns whether an `absolute_gap` is a near-tie for a target of this dtype."""
    return gap < ABSOLUTE_MARGIN[dtype]


def near_tie_relative(gap: float, dtype: str = "float32") -> bool:
    """Returns whether a `relative_gap` is a near-tie for a target of this dtype."""
    return gap < RELATIVE_MARGIN[dtype]


def first_difference(one: Sequence[int], two: Sequence[int]) -> int | None:
    """Returns the first index at which two texts differ, or one has ended; None if they are equal."""
    shorter = min(len(one), len(two))
    ended = shorter if len(one) != len(two) else None
    return next((index for index in range(shorter) if one[index] != two[index]), ended)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference of a sequence's plain and speculative text.

    row: index of the sequence. index: of the new token, from 0. plain, speculative: its ids; None where that text has
    ended. gap: the `absolute_gap` of the two, or None where a text ended or more than the logits chose.
    """

    row: int
    index: int
    plain: int | None
    speculative: int | None
    gap: float | None

    @property
    def near_tie(self) -> bool:
        """Whether rounding in float32 explains it."""
        return self.gap is not None and near_tie_absolute(self.gap)

    def __str__(self) -> str:
        gap = "" if self.gap is None else f"; the lesser logit is {self.gap:.2g} below the best"
        place = f"prompt {self.row + 1}, new token {self.index + 1}"
        return f"{place}: plain {self.plain}, speculative {self.speculative}{gap}"


def differences(
    target: Target,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Sequence[int]],
    speculative: Sequence[Sequence[int]],
    sampling: SamplingConfig = SamplingConfig(),
    buckets: Sequence[int] = BUCKETS,
) -> list[Difference] | None:
    """Finds the first difference of every sequence whose two texts are not equal.

    Args:
      target: its logits measure the gaps, where they alone choose the token.
      plain, speculative: the new tokens after each prompt.
      sampling: what the texts were decoded with.
      buckets: widths that texts are padded to for a pass of the target.
    Returns:
      None where two texts may differ by chance: samples that are not coupled.
    """
    if sampling.temperature != 0 and not sampling.coupled:
        return None
    found = []
    for row, (prompt, one, two) in enumerate(zip(prompts, plain, speculative, strict=True)):
        index = first_difference(one, two)
        if index is None:
            continue
        first, second = (text[index] if index < len(text) else None for text in (one, two))
        gap = None
        if sampling.greedy and first is not None and second is not None:
            gap = absolute_gap(_next_logits(target, [*prompt, *one[:index]], buckets), [first, second])
        found.append(Difference(row, index, first, second, gap))
    return found


def _next_logits(target: Target, tokens: Sequence[int], buckets: Sequence[int]) -> np.ndarray:
    """Returns the target's logits [V] for the token after `tokens`."""
    logits, _ = forward(target, *pad([tokens], buckets))
    return np.asarray(logits[0, len(tokens) - 1])
