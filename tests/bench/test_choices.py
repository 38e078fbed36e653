"""bench.decode.choices at a tiny shape on the CPU: every choice gets a time, and XLA knows the flags."""

from __future__ import annotations

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bench.decode import choices
from bench.shapes import SHAPES

TINY = SHAPES["tiny"].target


def test_every_choice_has_a_time_beside_the_first():
    rows = list(choices.product_rows(TINY, jnp.dtype("float32"), [1, 4], repeats=1))
    assert [(row["case"], row["at"], row["choice"]) for row in rows] == [
        (case, at, choice)
        for case in ("qkv", "gate and up")
        for at in ("1 rows", "4 rows")
        for choice in ("apart", "joined")
    ]
    assert all(row["microseconds"] > 0 for row in rows)
    assert all(row["beside the first"] == 1 for row in rows[::2])


def test_attention_is_timed_where_the_context_fits():
    rows = list(choices.attention_rows(TINY, jnp.dtype("float32"), 3, [16, 64], [32, 64], repeats=1))
    places = [row["at"] for row in rows[::3]]
    assert places == ["3 nodes, 16 of 32 rows", "3 nodes, 16 of 64 rows", "3 nodes, 64 of 64 rows"]
    assert len({row["choice"] for row in rows}) == 3


def test_flags_are_compared_by_the_roofline_s_figures(monkeypatch):
    milliseconds = dict(zip(choices.FLAGS.values(), np.arange(1.0, 10.0), strict=False))

    def roofline(shape, dtype, context, repeats, flags):
        if "cublas_fallback" in flags:
            return {}  # that process failed
        return {"plain": {"ms": milliseconds[flags]}, "cycle": {"ms": 2 * milliseconds[flags]}}

    monkeypatch.setattr(choices, "_roofline", roofline)
    rows = list(choices.flag_rows("tiny", "float32", [64], 1))
    assert [row["choice"] for row in rows[:4]] == [name for name in choices.FLAGS if name != "Triton alone"]
    assert [row["beside the first"] for row in rows[:4]] == [1, 2, 4, 5]
    assert [row["microseconds"] for row in rows[4:]] == [2000, 4000, 8000, 10000]


@pytest.mark.parametrize("known", [True, False])
def test_xla_knows_the_flags(known):
    """XLA ends a process that has a flag which it does not know."""
    flags = " ".join(choices.FLAGS.values()) if known else "--xla_gpu_nonsense=1"
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == known, done.stderr
