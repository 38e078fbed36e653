"""Compares two checkouts of this package, which decode the same texts in turn: tok/s of each, and the ratio.

    git worktree add ../before COMMIT
    python -m bench.decode.before_after --before ../before --after .

Each checkout has its process, which stays alive and works only in its turn. The order alternates. Plain and speculative
decoding of the embedded pair and of the tests' parity pair, greedy, one prompt at a time, weights stored input first as
the commands do on a CPU. Models and prompts are those of the checkout that this command runs from. Ends with 1 if the
texts of the two differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS, PROMPT_TOKENS, PROMPTS = 96, 32, 6


@dataclasses.dataclass(frozen=True)
class Pair:
    """Folders of a target and its head, and a file of prompts. tree: depth, top_k, num_nodes."""

    target: str
    head: str
    prompts: str
    tree: tuple[int, int, int]


PAIRS = {
    "embedded": Pair("eagle_jax/pair/target", "eagle_jax/pair/head_eagle1", "recipes/pair/prompts.jsonl", (3, 1, 4)),
    "parity": Pair(
        "tests/golden/weights/t1_target",
        "tests/golden/weights/t1_eagle3_dv96",
        "tests/golden/parity_prompts.jsonl",
        (8, 10, 60),
    ),
}
CASES = [f"{pair} {decoding}" for pair in PAIRS for decoding in ("plain", "speculative")]


class Checkout:
    """The process of a checkout, which decodes a case when asked."""

    def __init__(self, path: str):
        # -P: no module of this file's folder is imported by its bare name.
        command = [sys.executable, "-P", __file__, "--serve", path]
        environment = os.environ | {"PYTHONPATH": str(Path(path).resolve())}
        self.path = path
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def decode(self, case: str) -> dict[str, Any]:
        """Decodes all prompts of a case; returns {"seconds", "texts"}."""
        assert self.process.stdin and self.process.stdout
        print(case, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.path} ended")
        return json.loads(answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", metavar="PATH", help="a checkout")
    parser.add_argument("--after", metavar="PATH", default=str(ROOT), help="another (default: this one)")
    parser.add_argument("--turns", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the table to this file too")
    parser.add_argument("--serve", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(Path(args.serve).resolve())
        return 0
    if args.before is None:
        parser.error("--before is needed")

    from bench import report  # not by the processes: theirs is that of their checkout

    checkouts = [Checkout(args.before), Checkout(args.after)]
    rows = (compare(case, checkouts, args.turns) for case in CASES if args.only in case)
    done = report.table(rows, args.json)
    return int(not all(row["same texts"] for row in done))


def compare(case: str, checkouts: list[Checkout], turns: int) -> dict[str, Any]:
    """Measures a case in turn; returns its row of the table."""
    first = [checkout.decode(case) for checkout in checkouts]  # compiles
    seconds: list[list[float]] = [[], []]
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[side].append(checkouts[side].decode(case)["seconds"])
    tokens = NEW_TOKENS * len(first[0]["texts"])
    before, after = map(statistics.median, seconds)
    ratios = sorted(b / a for b, a in zip(*seconds, strict=True))
    return {
        "case": case,
        "before, tok/s": tokens / before,
        "after, tok/s": tokens / after,
        "after / before": statistics.median(ratios),
        "middle half": f"{ratios[turns // 4]:.2f} to {ratios[-1 - turns // 4]:.2f}",
        "first call before, s": first[0]["seconds"],
        "after, s": first[1]["seconds"],
        "same texts": first[0]["texts"] == first[1]["texts"],
    }


def serve(checkout: Path) -> None:
    """Decodes the cases named on stdin, one a line, by a checkout's package. Uses only public names."""
    import eagle_jax

    assert Path(str(eagle_jax.__file__)).is_relative_to(checkout), eagle_jax.__file__
    for line in sys.stdin:
        texts, began = [], time.perf_counter()
        for run in runs(line.strip()):
            out = run()
            texts.append(out.tokens.block_until_ready())
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "texts": [text[0].tolist() for text in texts]}), flush=True)


@functools.cache
def runs(case: str) -> list[Callable[[], Any]]:
    """Returns the calls of `generate` of a case, one a prompt."""
    import eagle_jax

    name, decoding = case.split()
    pair = PAIRS[name]
    loaded: Any = eagle_jax.from_pretrained(ROOT / pair.target, ROOT / pair.head, dtype="float32")
    target, head = (eagle_jax.input_first(model) for model in loaded)
    generate: Callable[..., Any] = functools.partial(
        eagle_jax.generate,
        target,
        head if decoding == "speculative" else None,
        tree=eagle_jax.TreeConfig(*pair.tree),
        max_new_tokens=NEW_TOKENS,
    )
    found: list[Callable[[], Any]] = []
    for line in (ROOT / pair.prompts).read_text(encoding="utf-8").splitlines()[:PROMPTS]:
        entry = json.loads(line)
        tokens = entry.get("tokens") or eagle_jax.tokenizer(ROOT / pair.target)(entry["prompt"])["input_ids"]
        found.append(functools.partial(generate, *eagle_jax.pad([tokens[:PROMPT_TOKENS]])))
    return found


if __name__ == "__main__":
    sys.exit(main())
