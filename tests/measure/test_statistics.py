"""Statistics of decoded texts, on texts drawn by hand."""

from __future__ import annotations

from eagle_jax.measure.statistics import accepted_shares, by_position, distinct_ngrams, tokens_a_cycle


def test_the_first_token_of_a_text_comes_from_no_cycle():
    assert tokens_a_cycle(new_tokens=14, texts=2, cycles=4) == 3
    assert tokens_a_cycle(new_tokens=2, texts=2, cycles=0) == 0


def test_shares_of_cycles_that_accepted_each_draft_token():
    assert accepted_shares([1, 2, 0, 1]) == [0.75, 0.25, 0.25]
    assert accepted_shares([5]) == [] and accepted_shares([0, 0]) == [0]


def test_acceptance_by_position():
    # The first token of each text counts nowhere. In the ranges: 254, 255; 256 to 259; and 600.
    drafted = [[False, True, False, True, True, True, False], [True, True]]
    found = by_position(drafted, [253, 599])
    assert [(part.start, part.end, part.tokens, part.own, part.tokens_a_pass) for part in found] == [
        (0, 256, 2, 1, 2.0),
        (256, 512, 4, 1, 4.0),
        (512, 1024, 1, 0, None),
    ]


def test_distinct_ngrams_tell_loops():
    assert distinct_ngrams([[1, 2, 3, 4, 5, 6, 7], [1] * 7]) == (1 + 1 / 4) / 2
    assert distinct_ngrams([[1, 2, 3], [1, 2]]) == 1.0
