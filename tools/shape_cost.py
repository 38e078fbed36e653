"""What a cycle costs beside a plain token on this machine, by the shape of the target: random weights, the real loop.

    python tools/shape_cost.py 128x12x384 192x12x512      hidden x layers x MLP width

The ratio says how many tokens a cycle must bring before it pays; a shape is good where that is few, at many tokens a
second. Acceptance cannot be known from random weights.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

import eagle_jax
from eagle_jax.models.config import DraftConfig, LlamaConfig
from eagle_jax.models.eagle3 import Eagle3Draft
from eagle_jax.models.llama import Llama

TREES = {"plain": None, "chain 3": (3, 1, 4), "chain 4": (4, 1, 5), "4,3,8": (4, 3, 8), "5,4,16": (5, 4, 16)}
VOCABULARY, NEW_TOKENS, REPEATS = 2048, 64, 5


def models(hidden: int, layers: int, mlp: int) -> tuple[Llama, Eagle3Draft]:
    heads = hidden // 32
    kv_heads = max(heads // 3, 1) if heads % 3 == 0 else max(heads // 4, 1)
    sizes = dict(hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=32, vocab_size=VOCABULARY)
    target = LlamaConfig(num_layers=layers, intermediate_size=mlp, tie_word_embeddings=True, **sizes)
    draft = DraftConfig(
        num_layers=1, intermediate_size=mlp, draft_vocab_size=VOCABULARY, target_hidden_size=hidden, **sizes
    )
    return Llama(target, jax.random.key(0)), Eagle3Draft(draft, 3, jax.random.key(1))


def main() -> None:
    tokens, lengths = jnp.ones((1, 32), jnp.int32), jnp.full(1, 32)
    for name in sys.argv[1:]:
        target, draft = models(*map(int, name.split("x")))
        size = sum(leaf.size for leaf in jax.tree.leaves(target))
        plain, cells = 0.0, []
        for label, tree in TREES.items():
            policy = None if tree is None else eagle_jax.TreeConfig(*tree)

            def run(target=target, draft=draft, policy=policy):
                if policy is None:
                    return eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW_TOKENS)
                return eagle_jax.generate(target, draft, tokens, lengths, tree=policy, max_new_tokens=NEW_TOKENS)

            jax.block_until_ready(run())
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                out = jax.block_until_ready(run())
                times.append((time.perf_counter() - start) / int(out.cycles[0]))
            cycle = statistics.median(times)
            plain = plain or cycle
            cells.append(f"{label} {cycle * 1e3:.2f} ms" + ("" if policy is None else f" = {cycle / plain:.2f}"))
        print(f"{name} ({size / 1e6:.1f}M): {1 / plain:.0f} tok/s plain; " + "; ".join(cells[1:]), flush=True)


if __name__ == "__main__":
    main()
