"""Where documents lie in the sequences of a batch: one in each, or several packed by segment ids."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32


class Layout(NamedTuple):
    """Documents of a batch, as numbers for every position.

    positions: the position inside its document, from 0.
    first: the position in the sequence where its document starts; a segment id, for no two documents share it.
    end: one past its document's last token. A query at t attends to keys from first[t] to min(t, end[t] - 1).
    """

    positions: Int32[Array, "batch positions"]
    first: Int32[Array, "batch positions"]
    end: Int32[Array, "batch positions"]


def layout(lengths: Int[Array, " batch"], width: int, documents: Int[Array, "batch {width}"] | None = None) -> Layout:
    """Lays out sequences that hold `lengths` tokens, right-padded to `width`.

    Args:
      documents: a number for every token that changes where a document ends. None: one document a sequence.

        lengths 5, documents 0 0 0 1 1 (1):  positions 0 1 2 0 1 0    first 0 0 0 3 3 5    end 3 3 3 5 5 6
    """
    batch = lengths.shape[0]
    row = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    if documents is None:
        # Padding sees the whole text and is not seen, as in the reference.
        return Layout(row, jnp.zeros_like(row), jnp.broadcast_to(lengths[:, None], (batch, width)).astype(jnp.int32))
    starts = (documents != jnp.pad(documents, [(0, 0), (1, 0)])[:, :-1]) | (row == 0) | (row == lengths[:, None])
    first = jax.lax.cummax(jnp.where(starts, row, 0), axis=1)
    # The next start to the right of every position, or the end of the sequence.
    following = jnp.pad(jnp.where(starts, row, width)[:, 1:], [(0, 0), (0, 1)], constant_values=width)
    return Layout(row - first, first, jax.lax.cummin(following, axis=1, reverse=True))
