"""Rows: a running state and its programs, for commands that give its rows one prompt after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eagle_jax
from eagle_jax.models.llama import Llama
from eagle_jax.prompt import reusable
from eagle_jax.tree import TreePolicy

_insert = jax.jit(eagle_jax.insert, static_argnames="reuse", donate_argnames="state")


class Rows:
    """B rows, all free at first.

    Args:
      draft: or None for plain decoding; then `tree` is ignored.
      capacity: the most tokens (prompt + new) a row may hold.
      buckets: the widths to pad prompts to.
      reuse: whether a row's next prompt keeps the cached positions of the text that both begin with.
      options: sampling, stop_tokens and log_probs, as in `empty_state`.
    """

    def __init__(
        self,
        target: Llama,
        draft: Any,
        batch: int,
        capacity: int,
        *,
        tree: TreePolicy,
        buckets: Sequence[int],
        reuse: bool = False,
        **options: Any,
    ):
        self.target, self.draft, self.tree = target, draft, None if draft is None else tree
        self.buckets, self.reuse = buckets, reuse and reusable(target, draft)

        # On a mesh every device makes its own part; the models, of which nothing is read, tell it which mesh.
        @functools.partial(jax.jit, keep_unused=True)
        def start(target, draft):
            state = eagle_jax.empty_state(target, draft, batch, capacity, tree=self.tree, **options)
            # As `insert` will leave it: else its first call and the later ones would be different programs.
            return dataclasses.replace(state, pending=jnp.zeros(batch, bool))

        self.state = start(target, draft)

    def compile(self, cycles: int) -> None:
        """Runs the programs once, on a prompt of one token, which row 0 is given and ends with."""
        self.insert(0, [0], jax.random.key(0), max_new_tokens=1)
        self.advance(cycles)

    def insert(self, row: int, prompt: Sequence[int], key: jax.Array, max_new_tokens: int) -> int:
        """Gives a row a prompt of 1 to capacity - 1 tokens; returns how many of them the cache holds already."""
        tokens, lengths = eagle_jax.pad([prompt], self.buckets)
        max_new_tokens = min(max_new_tokens, self.state.capacity)  # int32 on the device
        self.state = _insert(
            self.state, row, tokens[0], lengths[0], key, max_new_tokens=max_new_tokens, reuse=self.reuse
        )
        return int(self.state.cache.length[row]) if self.reuse else 0

    def advance(self, cycles: int) -> eagle_jax.Chunk:
        """Runs the new prompts and up to so many cycles; the rows' new tokens as NumPy arrays."""
        self.state, chunk = eagle_jax.advance(self.target, self.draft, self.state, tree=self.tree, cycles=cycles)
        return jax.device_get(chunk)

    def free(self, row: int) -> None:
        """Ends a row whose text is not wanted any longer, so that it keeps no program running."""
        self.state = dataclasses.replace(self.state, done=self.state.done.at[row].set(True))

    @property
    def cycles(self) -> np.ndarray:
        """[B] target passes that each row's text took after its prompt."""
        return jax.device_get(self.state.cycles)
