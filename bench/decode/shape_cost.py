"""Measures what a cycle costs in plain steps on this machine, by the target's shape: random weights, the real loop.

    python -m bench.decode.shape_cost 128x12x384 192x12x512      hidden x layers x MLP width

A cycle's cost in plain steps is the number of tokens it must bring before it pays. A good shape needs few, at many
tokens a second. Every shape is measured with its weights as they are and as `input_first` stores them. Acceptance
cannot be known from random weights.
"""

import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp

import eagle_jax
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.measure.timing import timed
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama

TREES = {"plain": None, "chain 3": (3, 1, 4), "chain 5": (5, 1, 6), "4,2,8": (4, 2, 8), "5,4,16": (5, 4, 16)}
VOCABULARY, NEW_TOKENS, REPEATS = 2048, 64, 9


def models(hidden: int, layers: int, mlp: int) -> tuple[Llama, Eagle3Draft]:
    heads = hidden // 64
    kv_heads = max(heads // 3, 1) if heads % 3 == 0 else max(heads // 4, 1)
    sizes: dict[str, Any] = dict(
        hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=64, vocab_size=VOCABULARY
    )
    target = LlamaConfig(num_layers=layers, intermediate_size=mlp, tie_word_embeddings=True, **sizes)
    draft = DraftConfig(
        num_layers=1, intermediate_size=mlp, draft_vocab_size=VOCABULARY, target_hidden_size=hidden, **sizes
    )
    return Llama(target, jax.random.key(0)), Eagle3Draft(draft, 3, jax.random.key(1))


def main() -> None:
    tokens, lengths = jnp.ones((1, 32), jnp.int32), jnp.full(1, 32)
    print(f"| shape | weights | plain, tok/s | {' | '.join(list(TREES)[1:])} |")
    print("|---" * (len(TREES) + 2) + "|")
    for name in sys.argv[1:]:
        pair = models(*map(int, name.split("x")))
        size = sum(leaf.size for leaf in jax.tree.leaves(pair[0])) / 1e6
        input_first = eagle_jax.input_first(pair[0]), eagle_jax.input_first(pair[1])
        stored = {"as they are": pair, "input first": input_first}
        runs = {
            (storage, label): functools.partial(
                eagle_jax.generate,
                target,
                None if tree is None else draft,
                tokens,
                lengths,
                tree=eagle_jax.TreeConfig(*tree or ()),
                max_new_tokens=NEW_TOKENS,
            )
            for storage, (target, draft) in stored.items()
            for label, tree in TREES.items()
        }
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for repeat in range(1 + REPEATS):
            for key, run in runs.items():
                took, out = timed(run)
                if repeat:  # the first one compiles
                    seconds[key].append(took / int(out.cycles[0]))
        for storage in stored:
            plain, *cycles = (statistics.median(seconds[storage, label]) for label in TREES)
            cells = " | ".join(f"{cycle / plain:.2f}" for cycle in cycles)
            print(f"| {name}, {size:.1f}M | {storage} | {1 / plain:.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
