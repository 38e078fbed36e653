"""Memory of a training step of an EAGLE-3 head for Llama-3.1-8B, by the number of steps of the training-time test.

    python tools/train_memory.py                      H200, 8192 tokens
    python tools/train_memory.py --device v5p --rows 2 --width 4096

The step is compiled by the real compiler of the device, which need not be there (extra `aot`; see tests/aot.py), and
what it says of its memory is printed: parameters and optimiser (of which the target is 16 GB), and temporaries.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from eagle_jax import DraftConfig, Eagle3Draft, Llama, LlamaConfig
from eagle_jax.models import params
from eagle_jax.train import step
from eagle_jax.train.config import OptimizerSettings
from eagle_jax.train.objective import Eagle3Objective
from tests import aot

LLAMA_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
)
HEAD_8B = LLAMA_8B | dict(num_hidden_layers=1, draft_vocab_size=32000)
DEVICES = {"h200": lambda: aot.gpu_devices()[0], "v5p": lambda: aot.tpu_devices("v5p:2x2x1")[0]}


class Memory(NamedTuple):
    """Bytes: arguments (target, masters, optimiser, batch), temporaries, and the most at one time."""

    arguments: int
    temporaries: int
    peak: int


def compiled_step(device: Any, steps: int, rows: int, width: int) -> jax.stages.Compiled:
    """A step of `rows` rows of `width` tokens, bfloat16 target and products, float32 masters, AdamW."""
    config = DraftConfig.from_hf(HEAD_8B)
    target = params.abstract(lambda key: Llama(LlamaConfig.from_hf(LLAMA_8B), key, jnp.bfloat16))
    draft = params.abstract(lambda key: Eagle3Draft(config, 3, key))
    arrays = params.flatten(draft)
    masters = {path: array for path, array in arrays.items() if path not in step.FROZEN}
    frozen = {path: array for path, array in arrays.items() if path in step.FROZEN}
    update = step.optimizer(OptimizerSettings(), 100)
    state = jax.eval_shape(functools.partial(step.initial_state, update=update, seed=0), masters)
    shape = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    batch = {name: shape for name in ("tokens", "loss_mask", "documents")}
    batch["lengths"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    objective = Eagle3Objective(tuple(0.8**k for k in range(steps)), dtype=jnp.bfloat16)

    def one(state, frozen, target, batch):
        return step.train_step(state, draft, frozen, target, batch, objective=objective, update=update)

    return aot.compile_for(device, one, state, frozen, target, batch, donate_argnums=0)


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says that a program needs."""
    kept = compiled.memory_analysis()
    peak = kept.argument_size_in_bytes + kept.temp_size_in_bytes + kept.output_size_in_bytes - kept.alias_size_in_bytes
    return Memory(kept.argument_size_in_bytes, kept.temp_size_in_bytes, peak)


def keys_and_values(steps: int, tokens: int) -> int:
    """Bytes of the steps' own keys and values, the first step's too."""
    config = DraftConfig.from_hf(HEAD_8B)
    return steps * tokens * 2 * config.num_kv_heads * config.head_dim * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 7])
    args = parser.parse_args()
    aot.find_compilers()
    tokens = args.rows * args.width
    print(f"{args.device}, Llama-3.1-8B, {args.rows} rows of {args.width} tokens, GB (1e9 bytes)")
    print("steps  arguments  temporaries   peak  own keys and values  growth beyond them")
    first = None
    for steps in args.steps:
        needed = memory(compiled_step(DEVICES[args.device](), steps, args.rows, args.width))
        own = keys_and_values(steps, tokens)
        first = first or (needed.peak, own)
        growth = (needed.peak - first[0] - (own - first[1])) / first[0]
        cells = (needed.arguments / 1e9, needed.temporaries / 1e9, needed.peak / 1e9, own / 1e9)
        print("{:5d}  {:9.2f}  {:11.2f}  {:5.2f}  {:19.2f}  {:17.1%}".format(steps, *cells, growth), flush=True)


if __name__ == "__main__":
    main()
