"""The same prompts, greedy, by transformers (PyTorch) and by this package, plain and speculative: tok/s, equal texts.

    python -m bench.decode.against_transformers --target DIR --draft DIR
    python -m bench.decode.against_transformers                             the embedded pair

Both run in one process, in turn, on the same kind of device and in the same dtype, one prompt at a time, without stop
tokens. A first call compiles or warms up; times are of whole calls, the prompt's pass too, medians of the repeats.

--official-eagle PATH adds the authors' own decoder from a checkout of github.com/SafeAILab/EAGLE, which is not part of
this package. That option was written from the documented interface (README and `EaModel.eagenerate`) and never run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import eagle_jax
from bench.options import parse_tree, positive
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.convert.read import resolve
from eagle_jax.decode.plan import plan
from eagle_jax.files.atomic import write_json
from eagle_jax.measure.machine import describe_setting, setting
from eagle_jax.measure.near_tie import first_difference
from eagle_jax.measure.samples import CODE_TEXTS, DEFAULT_TEXTS, embedded_pair, to_measure
from eagle_jax.measure.timing import median_seconds
from eagle_jax.models.params import for_this_machine
from eagle_jax.tree.named import describe_tree

TREE = eagle_jax.TreeConfig(depth=8, top_k=10, num_nodes=60)

# prompt token ids -> the new tokens' ids, on the host
Decode = Callable[[Sequence[int]], list[int]]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One decoder's texts, a list of new tokens a prompt, and the seconds of all of them."""

    texts: list[list[int]]
    seconds: float

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return sum(map(len, self.texts)) / self.seconds


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the device, too
    args = _parser().parse_args(arguments)
    embedded = args.target is None
    if embedded:
        args.target, args.draft = (str(embedded_pair() / name) for name in ("target", "head"))
    pair = eagle_jax.from_pretrained(args.target, args.draft, dtype=args.dtype)
    target, draft = map(for_this_machine, pair)
    folder = resolve(args.target)
    texts = CODE_TEXTS if embedded else DEFAULT_TEXTS
    rows, _ = to_measure(args.prompts, folder, embedded, texts)
    decoders = {"transformers": transformers_decoder(folder, np.dtype(target.dtype).name, args.max_new_tokens)}
    for name, head in [("plain", None)] + ([("speculative", draft)] if draft is not None else []):
        decoders[name] = our_decoder(target, head, args.tree, args.max_new_tokens)
    if args.official_eagle is not None:
        decoders["official EAGLE"] = official_decoder(
            args.official_eagle, args.target, args.draft, np.dtype(target.dtype).name, args.max_new_tokens
        )
    found = {name: measure(decode, rows, args.repeats) for name, decode in decoders.items()}
    report = {
        **setting(target),
        "target": args.target,
        "draft": args.draft,
        "tree": str(args.tree),
        "prompts": len(rows),
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "decoders": comparison(found),
    }
    print(f"{describe_setting(report)}; {describe_tree(args.tree)}")
    print(f"{len(rows)} prompts, {args.max_new_tokens} new tokens each\n")
    print("| decoder | tokens | tok/s | to transformers | equal texts | equal tokens before the first difference |")
    print("|---|---|---|---|---|---|")
    for name, row in report["decoders"].items():
        equal = f"{row['equal_texts']} of {len(rows)} | {row['equal_tokens']:.1%}"
        print(f"| {name} | {row['tokens']} | {row['tokens_per_second']:.4g} | {row['ratio']:.2f} | {equal} |")
    if args.json is not None:
        write_json(Path(args.json), report)


def transformers_decoder(folder: Path, dtype: str, max_new_tokens: int) -> Decode:
    """Returns `generate` of transformers with its default cache, on a CUDA device if JAX uses one."""
    import torch
    import transformers

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    # In place of the model's own: greedy, and without stop tokens, so that every decoder makes as many tokens.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )

    def decode(prompt: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt)], device=device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids))
        return out[0, len(prompt) :].tolist()

    return decode


def our_decoder(target: Any, draft: Any, tree: Any, max_new_tokens: int) -> Decode:
    """Returns `eagle_jax.generate`; plain decoding where the draft is None."""

    def decode(prompt: Sequence[int]) -> list[int]:
        tokens, lengths = eagle_jax.pad([prompt])
        trained = target.config.max_position_embeddings
        sizes = plan(tokens.shape[1], max_new_tokens, trained=trained, longest=len(prompt))
        out = eagle_jax.generate(
            target, draft, tokens, lengths, tree=tree, max_new_tokens=max_new_tokens, capacity=sizes.capacity
        )
        return np.asarray(out.tokens[0, len(prompt) : int(out.lengths[0])]).tolist()

    return decode


def official_decoder(checkout: str, target: str, draft: str, dtype: str, max_new_tokens: int) -> Decode:
    """Returns `EaModel.eagenerate` with its README's settings; unlike ours it ends at the end-of-text token."""
    import torch

    sys.path.insert(0, checkout)
    from eagle.model.ea_model import EaModel

    model = EaModel.from_pretrained(
        base_model_path=target,
        ea_model_path=draft,
        total_token=60,
        depth=7,
        top_k=10,
        use_eagle3=True,
        torch_dtype=getattr(torch, dtype),
        device_map="auto",
    ).eval()

    def decode(prompt: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt)], device=next(model.base_model.parameters()).device)
        out = model.eagenerate(ids, temperature=0, max_new_tokens=max_new_tokens)
        return out[0, len(prompt) :].tolist()[:max_new_tokens]  # its last cycle may exceed the limit

    return decode


def measure(decode: Decode, rows: Sequence[Sequence[int]], repeats: int) -> Decoded:
    """Decodes all prompts; returns the texts, and the sum of each prompt's median seconds."""
    texts, seconds = [], 0.0
    for prompt in rows:
        texts.append(decode(prompt))
        seconds += median_seconds(functools.partial(decode, prompt), repeats)
    return Decoded(texts, seconds)


def comparison(found: dict[str, Decoded]) -> dict[str, dict[str, Any]]:
    """Compares every decoder with the first: rate, equal texts, and the share of tokens before texts part."""
    first = next(iter(found.values()))
    rows = {}
    for name, decoded in found.items():
        pairs = list(zip(decoded.texts, first.texts, strict=True))
        rows[name] = {
            "tokens": sum(map(len, decoded.texts)),
            "seconds": decoded.seconds,
            "tokens_per_second": decoded.rate,
            "ratio": decoded.rate / first.rate,
            "equal_texts": sum(ours == theirs for ours, theirs in pairs),
            "equal_tokens": sum(_common(*pair) for pair in pairs) / sum(len(theirs) for _, theirs in pairs),
        }
    return rows


def _common(ours: list[int], theirs: list[int]) -> int:
    """Counts the tokens before the first difference."""
    index = first_difference(ours, theirs)
    return len(ours) if index is None else index


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode.against_transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target", metavar="DIR_OR_ID", help="Hugging Face folder or hub id (default: the embedded pair)"
    )
    parser.add_argument("--draft", metavar="DIR_OR_ID", help="its EAGLE head; without one, plain decoding alone")
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, help="of all decoders (default: the target's own)")
    parser.add_argument("--tree", type=parse_tree, default=TREE, help="default: 8,10,60")
    parser.add_argument("--prompts", metavar="FILE", help="as for eagle-jax bench; default: a few built-in ones")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=3, metavar="R", help="default: %(default)s")
    parser.add_argument("--official-eagle", metavar="PATH", help="a checkout of SafeAILab/EAGLE, to run it too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    return parser


if __name__ == "__main__":
    main()
