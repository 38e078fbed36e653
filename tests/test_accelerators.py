"""The decoder at Llama-3.1-8B shape, compiled by the real compilers of an H200 and a TPU v5p: memory and copies."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from eagle_jax import DraftConfig, Eagle3Draft, Llama, LlamaConfig, SamplingConfig, TreeConfig
from eagle_jax.models import params
from tests.aot import compile_for, gpu_devices, tpu_devices
from tools import train_memory
from tools.train_memory import HEAD_8B, LLAMA_8B

ROWS, PROMPT = 8192, 512

DEVICES = {"H200": gpu_devices, "TPU v5p": lambda: tpu_devices("v5p:2x2x1")}


def pair_8b():
    """Abstract target and head, bfloat16."""
    target, head = LlamaConfig.from_hf(LLAMA_8B), DraftConfig.from_hf(HEAD_8B)
    return (
        params.abstract(lambda key: Llama(target, key, jnp.bfloat16)),
        params.abstract(lambda key: Eagle3Draft(head, 3, key, jnp.bfloat16)),
    )


def prompts():
    return jax.ShapeDtypeStruct((1, PROMPT), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)


def cache_bytes(state: eagle_jax.DecodeState) -> tuple[int, int]:
    """Bytes of the target's cache, and of both caches."""
    target = sum(x.size * x.dtype.itemsize for x in state.cache.k + state.cache.v)
    return target, target + sum(x.size * x.dtype.itemsize for x in state.draft.cache.k + state.draft.cache.v)


def large_copies(hlo: str) -> list[str]:
    """Copies and transposes of a million elements or more: a weight or a cache."""
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", hlo)
    return [shape for shape in copies if math.prod(map(int, shape.split(","))) >= 2**20]


SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=1.0),
    "coupled": SamplingConfig(temperature=1.0, coupled=True),
}


@pytest.mark.parametrize(
    ("device", "sampling"), [*(("H200", name) for name in SAMPLINGS), ("TPU v5p", "greedy"), ("TPU v5p", "sampled")]
)
def test_a_cycle_updates_its_caches_in_place_and_needs_little_else(device, sampling):
    target, draft = pair_8b()
    prefill = functools.partial(eagle_jax.prefill, max_new_tokens=ROWS - PROMPT, sampling=SAMPLINGS[sampling])
    state = jax.eval_shape(prefill, target, draft, *prompts(), jax.eval_shape(lambda: jax.random.key(0)))
    compiled = compile_for(DEVICES[device]()[0], eagle_jax.cycle, target, draft, state, donate_argnums=2)
    memory, (target_cache, caches) = compiled.memory_analysis(), cache_bytes(state)
    assert target_cache >= 2**30
    assert memory.alias_size_in_bytes >= caches
    # Sampling holds a few arrays of [N, V] float32 beside, 31 MB each.
    assert memory.temp_size_in_bytes < target_cache / (5 if sampling == "greedy" else 4)
    # The TPU compiler turns the draft's two cache arrays around, there and back, for the levels of drafting to read;
    # that of the GPU copies them twice where conditions follow (top-k, top-p, penalties). One layer of 33.
    draft_cache = ",".join(map(str, state.draft.cache.k[0].shape))
    expected = [draft_cache] * (0 if (device, sampling) == ("H200", "greedy") else 4)
    logits = f"1,{TreeConfig().num_nodes},{LLAMA_8B['vocab_size']}"  # a condition's way round is a copy
    copies = [shape for shape in large_copies(compiled.as_text()) if sampling == "greedy" or shape != logits]
    assert copies == expected[: len(copies)]


@pytest.mark.parametrize("device", DEVICES)
def test_generate_needs_little_beside_its_caches(device):
    target, draft = pair_8b()
    new = ROWS - PROMPT
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=new), target, draft, *prompts())
    generate = functools.partial(eagle_jax.generate, max_new_tokens=new)
    compiled = compile_for(DEVICES[device]()[0], generate, target, draft, *prompts())
    target_cache, caches = cache_bytes(state)
    # The caches are made inside the program, so they are among its temporaries.
    assert compiled.memory_analysis().temp_size_in_bytes - caches < target_cache / 5
    assert "callback" not in compiled.as_text()


def test_training_s_memory_does_not_grow_with_the_steps():
    """8192 tokens, bfloat16 target included; growth beyond the steps' own keys and values."""
    steps = {count: train_memory.compiled_step(gpu_devices()[0], count, 4, 2048) for count in (1, 7)}
    one, seven = (train_memory.memory(compiled) for compiled in steps.values())
    own = train_memory.keys_and_values(7, 8192) - train_memory.keys_and_values(1, 8192)
    assert one.arguments > 16e9 and seven.peak < 80e9
    assert seven.peak - own < 1.1 * one.peak
    # Logits of all positions exist nowhere.
    assert not re.search(r"\[(4,2048|8192),(32000|128256)\]", steps[7].as_text())
