"""A training step of the head of Llama-3.1-8B, by the real compiler of an H200: memory by steps and by layers."""

from __future__ import annotations

import re

from bench.aot import programs
from bench.train import memory
from tests.accelerators.facts import FEW, MORE, extended, facts, shape
from tests.aot import gpu_devices

ROWS, WIDTH = 4, 2048


def step(layers: int, steps: int):
    """8192 tokens, bfloat16 target included."""
    return facts(programs.train_step(shape(layers), ROWS, WIDTH, steps), gpu_devices()[0])


def test_memory_does_not_grow_with_the_steps():
    """Beyond the steps' own keys and values: a step keeps less than six arrays as large as the hidden states."""
    one, seven, more = step(FEW, 1), step(FEW, 7), step(MORE, 7)
    own = memory.keys_and_values(7, ROWS * WIDTH) - memory.keys_and_values(1, ROWS * WIDTH)
    hidden_states = ROWS * WIDTH * shape(FEW).target.hidden_size * 2  # bfloat16
    assert seven.peak - own - one.peak < 6 * 6 * hidden_states
    assert extended(seven.arguments, more.arguments) > 16e9
    whole = extended(seven.peak, more.peak)
    assert whole < 80e9
    assert whole - own < 1.1 * (one.peak + whole - seven.peak)
    assert more.temporaries - seven.temporaries < 2**20  # a target's layer leaves nothing behind
    # Attention is the flash kernel's, forward and backward, and logits of all positions exist nowhere.
    assert {"flash forward", "flash backward"} <= set(seven.held)
    assert not [array for array in seven.arrays if re.fullmatch(r"(4,2048|8192),(32000|128256)", array)]
