"""Measures tokens a cycle under the two sampled acceptance rules, and the gain of the coupled one.

    python -m bench.decode.acceptance_by_rule --target DIR --draft DIR [--prompts FILE.jsonl]

Both rules see the same prompts and keys; the error is the standard error over texts.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

import eagle_jax
from eagle_jax import SamplingConfig, TreeConfig
from eagle_jax.convert.hub import resolve
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.measure.samples import CODE_TEXTS, to_measure
from eagle_jax.models.params import for_this_machine

TREES = (TreeConfig(8, 10, 60), TreeConfig(6, 4, 16), TreeConfig(5, 1, 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--draft", required=True, help="its EAGLE head")
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, help="of both (default: their own)")
    parser.add_argument("--prompts", help="default: those of `eagle-jax demo`")
    parser.add_argument("--samples", type=int, default=16, help="texts a prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.6])
    args = parser.parse_args()
    pair = eagle_jax.from_pretrained(args.target, args.draft, dtype=args.dtype)
    target, draft = map(for_this_machine, pair)
    found, _ = to_measure(args.prompts, resolve(args.target), raw=True, texts=CODE_TEXTS[:4])
    tokens, lengths = eagle_jax.pad(found)
    before = np.repeat(np.asarray(lengths), args.samples)
    print(f"{len(found)} prompts, {args.samples} texts each, {args.max_new_tokens} new tokens; {jax.devices()[0]}")
    for tree in TREES:
        for temperature in args.temperatures:
            rates = {}
            for coupled in (False, True):
                out = eagle_jax.generate(
                    target,
                    draft,
                    tokens,
                    lengths,
                    jax.random.key(0),
                    tree=tree,
                    sampling=SamplingConfig(temperature=temperature, coupled=coupled),
                    max_new_tokens=args.max_new_tokens,
                    num_samples=args.samples,
                )
                # The first token comes from the prompt's pass.
                rates[coupled] = (np.asarray(out.lengths) - before - 1) / np.asarray(out.cycles)
            usual, coupled = rates[False], rates[True]
            gain = 100 * (coupled.mean() / usual.mean() - 1)
            print(
                f"depth {tree.depth}, top_k {tree.top_k}, {tree.num_nodes} nodes, temperature {temperature}:", end=" "
            )
            print(f"accept_sampling {with_error(usual)}, accept_coupled {with_error(coupled)} tokens a cycle,", end=" ")
            print(f"{gain:+.0f}%", flush=True)


def with_error(rates: np.ndarray) -> str:
    return f"{rates.mean():.2f} +- {rates.std(ddof=1) / len(rates) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
