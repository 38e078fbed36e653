from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.vocabulary import official_tables, target_ids_of


def marks(ids: list[int], size: int = 6) -> np.ndarray:
    return np.isin(np.arange(size), ids)


def test_worked_example():
    ids = target_ids_of(np.array([1, 1, 3]), marks([1, 2, 5]), 3, 6, "head")
    assert ids is not None and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [1, 2, 5])
    np.testing.assert_array_equal(target_ids_of(np.array([1, 1, 3]), None, 3, 6, "head"), [1, 2, 5])


@pytest.mark.parametrize("d2t", [None, np.zeros(6, np.int64), np.array([1, -1, 9]), np.zeros(2, np.float32)])
@pytest.mark.parametrize("t2d", [None, np.ones(6, np.bool_), np.zeros(3, np.int8)])
def test_tables_of_one_vocabulary_are_not_read(d2t: np.ndarray | None, t2d: np.ndarray | None):
    assert target_ids_of(d2t, t2d, 6, 6, "head") is None


@pytest.mark.parametrize(
    ("d2t", "t2d", "sizes", "message"),
    [
        (None, marks([1, 2, 5]), (3, 6), "d2t is missing.*draft_vocab_size 3.*vocab_size 6"),
        ([1, 1, 4], None, (3, 6), "d2t maps 1 draft ids out of the vocabulary of 6.*2 -> 6"),
        ([-1, 1, 3], None, (3, 6), "0 -> -1"),
        ([2**63 - 1, 0, 0], None, (3, 6), "out of the vocabulary"),
        ([1, 0, 3], None, (3, 6), "several draft ids to one target id"),
        ([1, 1, 3], marks([1, 2, 4]), (3, 6), "d2t and t2d contradict"),
        ([1, 1, 3], marks([1, 2]), (3, 6), "d2t and t2d contradict.*3 target ids, t2d marks 2"),
    ],
)
def test_damaged_tables(d2t: list[int] | None, t2d: np.ndarray | None, sizes: tuple[int, int], message: str):
    with pytest.raises(CheckpointError, match=f"some/head.*{message}"):
        target_ids_of(None if d2t is None else np.array(d2t, np.int64), t2d, *sizes, "some/head")


@hypothesis.given(st.sets(st.integers(0, 40), min_size=1, max_size=40))
def test_round_trip(ids: set[int]):
    ours = np.array(sorted(ids), np.int32)
    d2t, t2d = official_tables(ours, 41)
    assert (d2t.dtype, t2d.dtype) == (np.int64, np.bool_)
    expected = None if len(ids) == 41 else ours
    np.testing.assert_array_equal(target_ids_of(d2t, t2d, len(ids), 41, "head"), expected)
