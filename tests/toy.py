"""Small models with random weights, the golden pairs, and greedy comparison: what the decoding tests share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

import eagle_jax
from eagle_jax import DraftConfig, Eagle1Draft, Eagle3Draft, Llama, LlamaConfig, Target, TreeConfig
from eagle_jax.convert import from_pretrained
from eagle_jax.measure.near_tie import differences
from tests import pickled

GOLDEN = Path(__file__).parent / "golden"

TARGET = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)


def draft_config(**changes: Any) -> DraftConfig:
    fields = {**TARGET.__dict__, "num_layers": 1, "draft_vocab_size": 41, "target_hidden_size": 32}
    return DraftConfig(**fields | changes)


def scaled(model: Any, scale: float) -> Any:
    """Scales every matrix of a model up, so that random logits differ by far more than rounding."""
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, model)


def random_target(seed: int, scale: float = 12.0) -> Llama:
    return scaled(Llama(TARGET, jax.random.key(seed)), scale)


def random_eagle3(seed: int, scale: float = 12.0) -> Eagle3Draft:
    return scaled(Eagle3Draft(draft_config(), 3, jax.random.key(seed)), scale)


def random_eagle1(seed: int, scale: float = 12.0) -> Eagle1Draft:
    return scaled(Eagle1Draft(draft_config(draft_vocab_size=97, fc_bias=True), jax.random.key(seed)), scale)


@functools.cache
def golden_pair(draft: str = "t1_eagle3_dv96", target: str = "t1_target") -> tuple[Llama, Any]:
    """Loads a pair of the PyTorch reference's parity weights, in float32."""
    weights = GOLDEN / "weights"
    return from_pretrained(weights / target, pickled.readable(weights / draft), dtype=jnp.float32)


def random_prompts(seed: int, batch: int, width: int, vocab: int = 97) -> tuple[jax.Array, jax.Array]:
    """Returns right-padded prompts [batch, width] of different lengths; the padding is noise."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, width), dtype=np.int32)
    return jnp.asarray(tokens), jnp.asarray(rng.integers(1, width + 1, batch, dtype=np.int32))


def rows_of(out: eagle_jax.Output) -> list[list[int]]:
    """Returns each sequence's tokens, prompt included."""
    tokens, lengths = jax.device_get((out.tokens, out.lengths))
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def near_ties(target: Target, ours: list[list[int]], theirs: list[list[int]], where: str = "") -> int:
    """Counts the texts, prompts included, that differ; fails unless each first differs at a near-tie."""
    parted = differences(target, [()] * len(ours), theirs, ours, buckets=(256,))
    for difference in parted:
        assert difference.near_tie, f"{where} {difference}: {ours[difference.row]} {theirs[difference.row]}"
    return len(parted)


@contextlib.contextmanager
def traced() -> Iterator[list[str]]:
    """Yields a list of the functions that JAX traces, and so compiles, inside the block."""
    names: list[str] = []

    def heard(event: str, seconds: float, **about: str) -> None:
        if event.endswith("jaxpr_trace_duration"):
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield names

        def heard_at_all():
            return 0

        jax.jit(heard_at_all)()
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert "heard_at_all" in names


# One shape of programs that several test files share.
TREE = TreeConfig(depth=3, top_k=2, num_nodes=6)
NEW = 16


def small_case() -> tuple[Llama, Eagle3Draft, jax.Array, jax.Array]:
    """Returns a target, a draft that it often agrees with, and three prompts of different lengths."""
    tokens, _ = random_prompts(2, 3, 10)
    return random_target(0, scale=6.0), random_eagle3(1, scale=6.0), tokens, jnp.array([10, 1, 6])


def generate(case, key=None, speculative=True, rows=slice(None), **options) -> eagle_jax.Output:
    """Calls `eagle_jax.generate` for some sequences of a small case."""
    target, draft, tokens, lengths = case
    options = dict(tree=TREE, max_new_tokens=NEW) | options
    return eagle_jax.generate(target, draft if speculative else None, tokens[rows], lengths[rows], key, **options)
