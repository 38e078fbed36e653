"""bench/report.py: which rows are measured, and where their table goes."""

import json
import sys

import pytest

from bench import report
from bench.aot import gpu, tpu

ROWS = {
    name: lambda layers, name=name: {"name": name, "layers": layers, "GiB": 1.234, "fits": True}
    for name in ("v5e cycle", "v5e train", "v6e cycle")
}


def run(monkeypatch, *args: str, rows=ROWS) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    return report.main("What it measures.\n\nMore.", rows)


def test_rows_that_are_asked_for_make_a_table_and_a_file(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--only", "cycle", "--layers", "2", "--json", str(tmp_path / "table.json")) == 0
    head, blank, *table = capsys.readouterr().out.splitlines()
    assert "jax 0." in head and blank == ""
    assert table == [
        "| name | layers | GiB | fits |",
        "|---|---|---|---|",
        "| v5e cycle | 2 | 1.23 | yes |",
        "| v6e cycle | 2 | 1.23 | yes |",
    ]
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["rows"][1] == {"name": "v6e cycle", "layers": 2, "GiB": 1.234, "fits": True}
    assert written["versions"]["jax"] in head and written["date"] in head


def test_list_measures_nothing(monkeypatch, capsys):
    run(monkeypatch, "--list", "--only", "v5e")
    assert capsys.readouterr().out == "v5e cycle\nv5e train\n"


@pytest.mark.parametrize(("fits", "copies", "status"), [(True, 0, 0), (False, 0, 1), (True, 2, 1)])
def test_what_does_not_fit_or_copies_is_an_error(monkeypatch, fits, copies, status):
    rows = {"a": lambda layers: {"fits": True, "copies": 0}, "b": lambda layers: {"fits": fits, "copies": copies}}
    assert run(monkeypatch, rows=rows) == status


@pytest.mark.parametrize("names", [[row.name for row in tpu.ROWS], list(gpu.ROWS)])
def test_names_of_rows_differ(names):
    assert len(set(names)) == len(names)
