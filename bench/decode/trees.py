"""Measures tokens a cycle of a draft with several trees, greedy: what a head brings, whatever the device.

python -m bench.decode.trees --target DIR --draft DIR --trees chain:7 best:7,16 8,10,60 [--prompts FILE.jsonl]
"""

from __future__ import annotations

import argparse

import numpy as np

import eagle_jax
from bench.options import parse_tree, positive
from eagle_jax.convert.hub import resolve
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.measure.samples import CODE_TEXTS, to_measure
from eagle_jax.measure.statistics import accepted_shares, tokens_a_cycle
from eagle_jax.models.params import for_this_machine
from eagle_jax.tree.named import describe_tree


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--draft", required=True, help="its head")
    parser.add_argument("--trees", type=parse_tree, nargs="+", required=True, help="as for --tree of the commands")
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, help="of both (default: their own)")
    parser.add_argument("--prompts", help="default: those of `eagle-jax demo`")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    args = parser.parse_args(arguments)
    target, draft = map(for_this_machine, eagle_jax.from_pretrained(args.target, args.draft, dtype=args.dtype))
    found, _ = to_measure(args.prompts, resolve(args.target), raw=True, texts=CODE_TEXTS[:4])
    tokens, lengths = eagle_jax.pad(found)
    print(f"{len(found)} prompts, {args.max_new_tokens} new tokens\n| tree | tokens a cycle | reached |\n|---|---|---|")
    for tree in args.trees:
        out = eagle_jax.generate(target, draft, tokens, lengths, tree=tree, max_new_tokens=args.max_new_tokens)
        accepted = np.asarray(out.accepted).sum(axis=0).tolist()
        rate = tokens_a_cycle(int((np.asarray(out.lengths) - lengths).sum()), len(found), sum(accepted))
        shares = " ".join(f"{share:.2f}" for share in accepted_shares(accepted))
        print(f"| {describe_tree(tree)} | {rate:.2f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
