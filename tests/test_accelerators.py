"""The decoder at Llama-3.1-8B shape, compiled by the real compilers of an H200 and of TPUs: memory and copies."""

from __future__ import annotations

import re

import pytest

import eagle_jax
from bench import gpu_aot, hlo, programs, tpu_aot
from bench.compilers import Memory, text
from bench.shapes import SHAPES
from tests.aot import gpu_devices, tpu_devices
from tools import train_memory

LLAMA_8B = SHAPES["8b"]
DEVICES = {"H200": gpu_devices, "TPU v5p": lambda: tpu_devices("v5p:2x2x1")}


def cache_bytes(state: eagle_jax.DecodeState) -> tuple[int, int]:
    """Bytes of the target's cache, and of both caches."""
    target = sum(x.size * x.dtype.itemsize for x in state.cache.k + state.cache.v)
    return target, target + sum(x.size * x.dtype.itemsize for x in state.draft.cache.k + state.draft.cache.v)


@pytest.mark.parametrize(
    ("device", "sampling"),
    [*(("H200", name) for name in gpu_aot.SAMPLINGS), ("TPU v5p", "greedy"), ("TPU v5p", "sampled")],
)
def test_a_cycle_updates_its_caches_in_place_and_needs_little_else(device, sampling):
    program, chip = programs.cycle(LLAMA_8B, 8192, sampling=gpu_aot.SAMPLINGS[sampling]), DEVICES[device]()[0]
    compiled = program.compile(chip)
    memory, (target_cache, caches) = compiled.memory_analysis(), cache_bytes(program.args[2])
    assert target_cache >= 2**30
    assert memory.alias_size_in_bytes >= caches
    # Sampling holds a few arrays of [N, V] float32 beside, 31 MB each.
    assert memory.temp_size_in_bytes < target_cache / (5 if sampling == "greedy" else 4)
    assert program.copies(compiled, chip) == []
    if (device, sampling) == ("H200", "greedy"):  # 1206 on 2026-11-23; each costs a microsecond or more
        assert hlo.kernels(text(compiled)) < 1300


@pytest.mark.parametrize("device", DEVICES)
def test_generate_needs_little_beside_its_caches(device):
    program, chip = programs.generate(LLAMA_8B, 8192, 512), DEVICES[device]()[0]
    compiled = program.compile(chip)
    target_cache, caches = cache_bytes(program.made)
    # The caches are made inside the program, so they are among its temporaries.
    assert compiled.memory_analysis().temp_size_in_bytes - caches < target_cache / 5
    assert "callback" not in text(compiled)
    assert program.copies(compiled, chip) == []


def test_a_cycle_of_four_v5e_chips_fits_them():
    """Weights and caches are split: 16 GB of weights over four chips of 16 GiB."""
    tpu_devices("v5e:2x2")
    row = next(row for row in tpu_aot.ROWS if row.name == "v5e:2x2 8b cycle")
    measured = tpu_aot.measure(row)
    assert 4 < measured["arguments GiB"] < 5
    assert measured["fits"] and measured["total GiB"] < 6
    assert measured["copies"] == 0


def test_training_s_memory_does_not_grow_with_the_steps():
    """8192 tokens, bfloat16 target included; growth beyond the steps' own keys and values."""
    steps = {count: train_memory.compiled_step(gpu_devices()[0], count, 4, 2048) for count in (1, 7)}
    one, seven = (Memory.of(compiled) for compiled in steps.values())
    own = train_memory.keys_and_values(7, 8192) - train_memory.keys_and_values(1, 8192)
    assert one.arguments > 16e9 and seven.peak < 80e9
    assert seven.peak - own < 1.1 * one.peak
    # Attention is the flash kernel's, forward and backward, and logits of all positions exist nowhere.
    assert "mha_forward" in text(steps[7]) and "mha_backward" in text(steps[7])
    assert not re.search(r"\[(4,2048|8192),(32000|128256)\]", text(steps[7]))


def test_a_training_step_of_four_v5e_chips_fits_them():
    """Every chip has the flash kernel for its own rows; no weight is copied."""
    tpu_devices("v5e:2x2")
    row = next(row for row in tpu_aot.ROWS if row.name == "v5e:2x2 8b train of 4")
    measured = tpu_aot.measure(row, layers=4)
    assert measured["fits"] and measured["copies"] == 0
