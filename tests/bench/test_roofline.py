"""The roofline command on the tiny shape: its table and its JSON agree with each other and with work.py."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from bench.decode import ceilings, roofline
from bench.decode.work import cycle_work, plain_work
from bench.shapes import ONE_PASS, SHAPES, abstract_pair
from eagle_jax import BestPrefixes, TreeConfig
from eagle_jax.measure import timing

SHAPE = SHAPES["tiny"].with_layers(1)
PARTS = ("propose", "verify", "commit", "extend")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command printed, and wrote."""
    path = tmp_path_factory.mktemp("roofline") / "roofline.json"
    options = "--shape tiny --batches 2 --contexts 40 100000000 --tree 3,2,6 --dtype float32 --repeats 1 --json"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(timing, "MIN_SECONDS", 0.001)
        patch.setattr(ceilings, "CPU", (2**16, 64))
        patch.setitem(SHAPES, "tiny", SHAPE)  # most of the time is compilation
        roofline.main([*options.split(), str(path)])
    return printed.getvalue().split("\n"), json.loads(path.read_text())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_cycle_is_the_sum_of_its_parts(measured):
    _, report = measured
    (row,) = report["rows"]
    parts, cycle = row["parts"], row["parts"]["cycle"]
    assert (row["batch"], row["context"]) == (2, 40)
    for field in ("bytes", "flops", "limit_ms"):
        assert cycle[field] == pytest.approx(sum(parts[name][field] for name in PARTS))
    assert row["rest_ms"] == pytest.approx(cycle["ms"] - sum(parts[name]["ms"] for name in PARTS))


def test_figures_follow_from_work_ceilings_and_times(measured):
    _, report = measured
    (row,) = report["rows"]
    ours = cycle_work(SHAPE.target, SHAPE.head, TreeConfig(depth=3, top_k=2, num_nodes=6), 2, 40, itemsize=4)
    plain = plain_work(SHAPE.target, 2, 40, itemsize=4)
    for name, work in (*ours.parts.items(), ("step", ours.step), ("plain", plain)):
        part = row["parts"][name]
        assert (part["bytes"], part["flops"]) == (work.bytes, work.flops)
        moving = work.bytes / report["copy_bytes_per_second"]
        computing = work.flops / report["product_flops_per_second"]
        assert part["limit_ms"] == pytest.approx(1000 * max(moving, computing))
        assert part["ratio"] == pytest.approx(part["ms"] / part["limit_ms"])
    assert all(part["ms"] > 0 for name, part in row["parts"].items() if name != "step")  # a difference of two times
    assert row["plain_tokens_per_second"] == pytest.approx(2000 / row["parts"]["plain"]["ms"])
    assert row["break_even_tau"] == pytest.approx(row["parts"]["cycle"]["ms"] / row["parts"]["plain"]["ms"])


def test_the_tables_say_what_the_json_says(measured):
    lines, report = measured
    (row,) = report["rows"]
    table = {cells(line)[2]: cells(line) for line in lines if line.startswith("| 2 | 40 |") and len(cells(line)) == 8}
    assert list(table) == [*roofline.PARTS, "rest"]
    for name, part in row["parts"].items():
        shown = [float(cell) for cell in table[name][3:]]
        exact = [part["bytes"] / 1e9, part["flops"] / 1e9, part["limit_ms"], part["ms"], part["ratio"]]
        assert shown == pytest.approx(exact, rel=1e-3)
    (rates,) = (cells(line) for line in lines if line.startswith("| 2 | 40 |") and len(cells(line)) == 9)
    plain, even, at_limit, *by_tau = map(float, rates[2:])
    assert plain == pytest.approx(row["plain_tokens_per_second"], rel=1e-3)
    assert (even, at_limit) == pytest.approx((row["break_even_tau"], row["break_even_tau_at_the_limit"]), abs=0.006)
    seconds = row["parts"]["cycle"]["ms"] / 1000
    assert by_tau == pytest.approx([2 * tau / seconds for tau in (1, 2, 3, 4)], rel=1e-3)


def test_what_does_not_fit_is_skipped_with_a_line(measured):
    lines, report = measured
    assert [(skip["batch"], skip["context"]) for skip in report["skipped"]] == [(2, 100000000)]
    assert any(line.startswith("| 2 | 100000000 | skipped: weights and caches are") for line in lines)


@pytest.mark.slow  # the heads have four or five layers
@pytest.mark.parametrize("head", ONE_PASS)
def test_heads_of_one_draft_pass_have_a_roofline(head, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.001)
    monkeypatch.setattr(ceilings, "CPU", (2**16, 64))
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    options = f"--shape tiny --head {head} --batches 1 --contexts 40 --tree best:3,6 --dtype float32 --repeats 1 --json"
    roofline.main([*options.split(), str(tmp_path / "roofline.json")])
    (row,) = json.loads((tmp_path / "roofline.json").read_text())["rows"]
    _, draft = abstract_pair(SHAPE, head=head)
    work = cycle_work(SHAPE.target, draft.config, BestPrefixes(3, 6), 1, 40, itemsize=4)
    assert {name: row["parts"][name]["bytes"] for name in PARTS} == {
        name: part.bytes for name, part in work.parts.items()
    }
    assert all(part["ms"] > 0 for part in row["parts"].values())
    with pytest.raises(SystemExit, match="tokens at most, such as best:"):
        roofline.main(["--shape", "tiny", "--head", head, "--tree", "best:99,100"])
