"""Key derivation: the typed keys of sequences, of their tokens, and of a draft's draws.

The text for a seed is a promise: any change here changes every sampled text.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def row_keys(
    key: Key[Array, ""] | Key[Array, " batch"] | None, batch: int, samples: int = 1
) -> Key[Array, " {batch*samples}"]:
    """Returns the keys of the sequences: fold_in(key, i) for one key; a key a sequence is returned unchanged.

    With several samples, sample j of prompt i has fold_in(key of prompt i, j).
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
    """Returns the keys of the next tokens: the token at index n of a sequence has fold_in(the sequence's key, n).

    A draw depends on the sequence's key and the token's index only, not on other sequences, chunks, or the number of
    cycles so far.

    Args:
      keys: of the sequences.
      lengths: tokens so far.
    """
    index = lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, index)


def draft_keys(keys: Key[Array, " batch"], lengths: Int[Array, " batch"], count: int) -> Key[Array, "batch {count}"]:
    """Returns keys for a draft's draws in this cycle, independent of all keys that choose tokens.

    Args:
      keys: of the sequences.
      lengths: tokens so far.
    """
    fold_in = jax.random.fold_in

    def of_row(key, length):
        base = fold_in(fold_in(key, jnp.uint32(2**32 - 1)), length)  # no token has this index
        return jax.vmap(fold_in, in_axes=(None, 0))(base, jnp.arange(count, dtype=jnp.int32))

    return jax.vmap(of_row)(keys, lengths)
