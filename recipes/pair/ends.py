"""Where the target's own greedy text begins to repeat itself, it is to end.

    python recipes/pair/ends.py REGENERATED.jsonl CORPUS.jsonl OUT.jsonl [end]

Reads what `eagle-jax train regenerate` wrote, and cuts every text before the second occurrence of eight tokens in a
row; there it is to end. What is learned is the new text up to there, as it is, and its end. Texts that end without
repeating themselves are kept whole. A quarter as many texts of the corpus stand beside them. A small model loops on
greedily where it should have ended. With `end` only the end is learned, beside a sixteenth as many texts of the corpus.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

END = 1  # <|eos|>
SIZE = 8
SHORTEST = 8  # new tokens


def main(source: Path, corpus: Path, out: Path, end_only: bool = False) -> None:
    lines, looped, ended = [], 0, 0
    for text in source.read_text(encoding="utf-8").splitlines():
        record = json.loads(text)
        tokens, start = record["tokens"], record["loss_mask"].index(1)
        place = repeats(tokens[start:])
        if place is not None:
            looped += 1
            tokens = tokens[: start + place]
        elif tokens[-1] == END:
            ended += 1
            tokens = tokens[:-1]
        else:
            continue
        if len(tokens) - start >= SHORTEST:
            mask = [0] * start + [0 if end_only else 1] * (len(tokens) - start) + [1]
            lines.append(json.dumps({"tokens": [*tokens, END], "loss_mask": mask}))
    lines += corpus.read_text(encoding="utf-8").splitlines()[-len(lines) // (16 if end_only else 4) :]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{looped} texts repeat themselves, {ended} end; {len(lines)} written")


def repeats(tokens: list[int]) -> int | None:
    """Where eight tokens in a row come for the second time: the place of the first of them."""
    seen = set()
    for place in range(len(tokens) - SIZE + 1):
        gram = tuple(tokens[place : place + SIZE])
        if gram in seen:
            return place
        seen.add(gram)
    return None


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[4:] not in ([], ["end"]):
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:4]), end_only=len(sys.argv) == 5)
