"""Keys: which typed key each sequence, each of its tokens and each of a draft's own draws has.

Texts per seed are a promise: a change here changes every sampled text.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def row_keys(
    key: Key[Array, ""] | Key[Array, " batch"] | None, batch: int, samples: int = 1
) -> Key[Array, " {batch*samples}"]:
    """The keys of the rows: fold_in(key, i) of one key, or keys, one a row, as they are.

    Of several samples, sample j of row i has fold_in(key of row i, j).
    """
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        got = "None" if key is None else f"{key.dtype}{list(key.shape)}"
        hint = "" if key is not None else " (greedy under a jit of your own: leave sampling out, or make it static)"
        raise ValueError(
            f"sampling needs key: one typed key, jax.random.key(seed), or [{batch}] of them, one a row; got {got}{hint}"
        )
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = fold_in(key, jnp.arange(batch, dtype=jnp.int32)) if key.ndim == 0 else key
    if samples > 1:
        keys = jax.vmap(fold_in, in_axes=(0, None))(keys, jnp.arange(samples, dtype=jnp.int32)).reshape(-1)
    return keys


def token_keys(keys: Key[Array, " batch"], lengths: Int[Array, " batch"], count: int) -> Key[Array, "batch {count}"]:
    """Keys of the next tokens: the token at index n of a sequence has fold_in(the sequence's key, n).

    A draw therefore depends on the sequence's key and the token's index alone: not on other sequences, on chunks, or on
    how many cycles the text before took.

    Args:
      keys: of the sequences. lengths: tokens so far.
    """
    index = lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, index)


def draft_keys(keys: Key[Array, " batch"], lengths: Int[Array, " batch"], count: int) -> Key[Array, "batch {count}"]:
    """Keys for a draft's own draws in this cycle, independent of every key that chooses tokens.

    Args:
      keys: of the sequences. lengths: tokens so far.
    """
    fold_in = jax.random.fold_in

    def of_row(key, length):
        base = fold_in(fold_in(key, jnp.uint32(2**32 - 1)), length)  # no token has this index
        return jax.vmap(fold_in, in_axes=(None, 0))(base, jnp.arange(count, dtype=jnp.int32))

    return jax.vmap(of_row)(keys, lengths)
