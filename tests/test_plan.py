"""Sizes: what a plan holds, and where the target's positions bind."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.decode.plan import Plan, cache_positions, limits_of, padded_width, plan


@pytest.mark.parametrize(
    ("width", "new", "options", "expected", "longest", "limits"),
    [
        (32, 32, {}, Plan(32, 64, 32), 32, [33, 64]),
        (32, 32, {"trained": 64}, Plan(32, 64, 32), 32, [33, 64]),
        (32, 33, {"trained": 64}, Plan(32, 64, 33), 32, [34, 64]),
        (32, 10**20, {"trained": 64}, Plan(32, 64, 10**20), 32, [64, 64]),
        (32, 8, {"capacity": 16}, Plan(32, 16, 8), 15, [9, 16]),
        (8, 4, {"capacity": 100}, Plan(8, 100, 4), 8, [5, 36]),
    ],
)
def test_plans(width, new, options, expected, longest, limits):
    sizes = plan(width, new, **options)
    assert sizes == expected and sizes.longest_prompt == longest
    assert sizes.limits(jnp.array([1, 32])).tolist() == limits
    assert sizes.columns == width + min(new, sizes.capacity)


def test_insert_s_limits_are_a_plan_s():
    length, most = jnp.int32(5), jnp.int32(7)
    assert [int(limits_of(length, asked, 20)) for asked in (None, 7, np.int64(7), most, 10**20)] == [20, 12, 12, 12, 20]


def test_a_prompt_that_fills_the_target_s_positions_is_refused():
    assert plan(64, 1, trained=64, longest=63).capacity == 64
    with pytest.raises(ValueError, match="a prompt has 64 tokens, this model takes at most 63 and one new token"):
        plan(64, 1, trained=64, longest=64)


def test_a_width_is_the_least_bucket_that_holds_a_prompt():
    assert [padded_width(length, (9, 2, 5)) for length in (1, 2, 3, 6, 9)] == [2, 2, 5, 9, 9]
    with pytest.raises(ValueError, match="a prompt has 10 tokens, the widest bucket holds 9"):
        padded_width(10, (2, 9))


def test_a_cache_has_room_for_a_commit_in_whole_tiles():
    assert [cache_positions(*sizes) for sizes in ((96, 31), (97, 31), (96, 32), (1000, 8))] == [128, 256, 256, 1152]
