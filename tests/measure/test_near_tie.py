"""Near-ties: how close two tokens' logits were, and which margin excuses that two texts part there."""

from __future__ import annotations

import numpy as np
import pytest

import eagle_jax
from eagle_jax import SamplingConfig
from eagle_jax.measure.near_tie import (
    Difference,
    absolute_gap,
    differences,
    first_difference,
    near_tie_absolute,
    near_tie_relative,
    relative_gap,
)
from tests.toy import golden_pair


def test_a_gap_is_what_the_lesser_token_lacks_to_the_best_of_all():
    logits = np.array([1.0, 4.0, 3.5, -8.0, 3.5])
    assert absolute_gap(logits, [1, 2]) == absolute_gap(logits, [2, 1]) == 0.5
    assert absolute_gap(logits, [2, 4]) == 0.5  # equal logits, but neither is the best
    assert absolute_gap(logits, [1, 3]) == 12
    assert relative_gap(logits, [1, 2]) == 0.5 / 8  # of the largest magnitude


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_margins_depend_on_the_dtype(dtype):
    absolute, relative = {"float32": (1e-4, 1e-4), "bfloat16": (0.125, 0.03125)}[dtype]
    for is_near, margin in ((near_tie_absolute, absolute), (near_tie_relative, relative)):
        assert is_near(0.0, dtype) and is_near(0.99 * margin, dtype) and not is_near(margin, dtype)


@pytest.mark.parametrize(
    ("one", "two", "index"),
    [([1, 2], [1, 2], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([], [], None)],
)
def test_the_first_difference_of_two_texts(one, two, index):
    assert first_difference(one, two) == first_difference(np.array(one), np.array(two)) == index


def test_differences_are_located_and_measured():
    target, _ = golden_pair()
    prompts = [[100, 101], [102]]
    logits, _ = eagle_jax.forward(target, *eagle_jax.pad([[102, 7]]))
    order = np.argsort(np.asarray(logits[0, 1]))
    best, worse = int(order[-1]), int(order[-3])
    plain, other = [[1, 2], [7, best, 9]], [[1, 2], [7, worse, 9]]
    (found,) = differences(target, prompts, plain, other)
    assert (found.row, found.index, found.plain, found.speculative) == (1, 1, best, worse)
    assert found.gap == pytest.approx(float(logits[0, 1, best] - logits[0, 1, worse]), rel=1e-3)
    assert not found.near_tie
    # Where a text has ended, or noise chose too, the logits explain nothing.
    ended = differences(target, prompts, plain, [[1], [7, best, 9]])
    assert ended == [Difference(0, 1, 2, None, None)] and not ended[0].near_tie
    coupled = differences(target, prompts, plain, other, SamplingConfig(1.0, coupled=True))
    assert coupled == [Difference(1, 1, best, worse, None)]
    assert differences(target, prompts, plain, other, SamplingConfig(1.0)) is None


def test_a_near_tie_is_excused():
    assert Difference(0, 3, 5, 6, gap=0.9e-4).near_tie and not Difference(0, 3, 5, 6, gap=1.1e-4).near_tie
    assert str(Difference(0, 3, 5, 6, 0.5)) == (
        "prompt 1, new token 4: plain 5, speculative 6; the lesser logit is 0.5 below the best"
    )
