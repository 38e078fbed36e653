"""Where documents lie in the rows of a batch: one a row, or several packed into it.

Letters: B batch, S positions of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """Of every position of a batch, [B, S] int32 each.

    positions: inside its document, from 0. first: the row's position where its document starts.
    end: the one behind its document's last token. A query at t attends to keys from first[t] to min(t, end[t] - 1).
    """

    positions: jax.Array
    first: jax.Array
    end: jax.Array


def layout(lengths: jax.Array, width: int, documents: jax.Array | None = None) -> Layout:
    """The layout of rows that hold `lengths` [B] tokens, right-padded to `width`.

    Args:
      documents: [B, S], a number for every token that changes where a document ends; None: one document a row.

        lengths 5, documents 0 0 0 1 1 (1):  positions 0 1 2 0 1 0    first 0 0 0 3 3 5    end 3 3 3 5 5 6
    """
    batch = lengths.shape[0]
    row = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    if documents is None:
        # Padding sees the whole text and is not seen, as in the reference.
        return Layout(row, jnp.zeros_like(row), jnp.broadcast_to(lengths[:, None], (batch, width)).astype(jnp.int32))
    starts = (documents != jnp.pad(documents, [(0, 0), (1, 0)])[:, :-1]) | (row == 0) | (row == lengths[:, None])
    first = jax.lax.cummax(jnp.where(starts, row, 0), axis=1)
    # The next start to the right of every position, or the row's end.
    following = jnp.pad(jnp.where(starts, row, width)[:, 1:], [(0, 0), (0, 1)], constant_values=width)
    return Layout(row - first, first, jax.lax.cummin(following, axis=1, reverse=True))
