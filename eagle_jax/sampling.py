"""SamplingConfig: how the next token is chosen from the target's logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Controls of sampling. A pytree whose leaves are scalars or [B], so that changing a number never retraces.

    temperature: 0 is greedy. A Python 0 selects the greedy program, which computes no probabilities.
    """

    temperature: Any = 0.0

    @property
    def greedy(self) -> bool:
        """Whether the temperature is a Python 0 (not an array that may hold 0)."""
        return isinstance(self.temperature, int | float) and self.temperature == 0
