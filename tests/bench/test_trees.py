"""bench/decode/trees.py: tokens a cycle by tree."""

from __future__ import annotations

import json

from bench.decode import trees


def test_a_line_a_tree(golden, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"tokens": list(b"import os\n")}) + "\n")
    pair = ["--target", str(golden / "weights" / "t1_target"), "--draft", str(golden / "weights" / "t1_eagle3_dv96")]
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--dtype", "float32", "--max-new-tokens", "9"]
    trees.main([*pair, *options, "--trees", "chain:2", "2,2,5"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [line[0] for line in lines] == ["chain of 2", "tree: depth 2, top_k 2, 5 nodes"]
    assert all(1 <= float(rate) <= 3 and len(reached.split()) == 2 for _, rate, reached in lines)
