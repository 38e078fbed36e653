"""Rows: a running state and its programs, for commands that give its rows one prompt after another."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eagle_jax
from eagle_jax.models.llama import Llama
from eagle_jax.tree import TreeConfig

_insert = jax.jit(eagle_jax.insert, static_argnames="reuse", donate_argnames="state")


class Rows:
    """B rows, all free at first. Two programs in all, and one for each further width of prompts.

    Args:
      draft: or None for plain decoding; then `tree` is ignored.
      capacity: the most tokens (prompt + new) a row may hold.
      options: sampling, stop_tokens and log_probs, as in `empty_state`.
    """

    def __init__(self, target: Llama, draft: Any, batch: int, capacity: int, tree: TreeConfig, **options: Any):
        self.target, self.draft, self.tree = target, draft, tree
        state = eagle_jax.empty_state(target, draft, batch, capacity, tree=None if draft is None else tree, **options)
        # As `insert` will leave it: else its first call and the later ones would be different programs.
        self.state = dataclasses.replace(state, pending=jnp.zeros(batch, bool))

    def insert(
        self,
        row: int,
        tokens: jax.Array,
        lengths: jax.Array,
        key: jax.Array,
        max_new_tokens: int,
        reuse: bool = False,
    ) -> int:
        """Gives a row a prompt, tokens [1, P] and lengths [1] as `pad` makes them.

        Args:
          reuse: keep the cached positions that the row's old text and the prompt have in common.
        Returns:
          How many were kept.
        """
        self.state = _insert(self.state, row, tokens[0], lengths[0], key, max_new_tokens=max_new_tokens, reuse=reuse)
        return int(self.state.cache.length[row]) if reuse else 0

    def advance(self, cycles: int) -> eagle_jax.Chunk:
        """Runs the new prompts and up to so many cycles; the rows' new tokens as NumPy arrays."""
        draft, tree = self.draft, None if self.draft is None else self.tree
        self.state, chunk = eagle_jax.advance(self.target, draft, self.state, tree=tree, cycles=cycles)
        return jax.device_get(chunk)

    def free(self, row: int) -> None:
        """Ends a row whose text is not wanted any longer, so that it keeps no program running."""
        self.state = dataclasses.replace(self.state, done=self.state.done.at[row].set(True))

    @property
    def cycles(self) -> np.ndarray:
        """[B] target passes that each row's text took after its prompt."""
        return jax.device_get(self.state.cycles)
