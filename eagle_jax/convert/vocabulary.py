"""Converts the vocabulary tables of an EAGLE-3 head between the official form and ours.

Official: `d2t` [Vd] int64, target id = draft id + d2t[draft id]; `t2d` [V] bool, True where a target id has a
draft id. Ours: `target_ids` [Vd] int32, the target ids, or None if the draft has the target's vocabulary.

    V = 6, target_ids = [1, 2, 5]:  d2t = [1, 1, 3],  t2d = [F, T, T, F, F, T]
"""

from __future__ import annotations

import numpy as np

from eagle_jax.convert.error import CheckpointError


def target_ids_of(
    d2t: np.ndarray | None, t2d: np.ndarray | None, draft_size: int, target_size: int, where: str
) -> np.ndarray | None:
    """Converts d2t [Vd] to target ids, and checks t2d [V], which may be absent, against it.

    Args:
      draft_size, target_size: Vd and V, from the head's config.
      where: the checkpoint's name, for messages.
    Returns:
      target_ids [Vd] int32; None where Vd == V, where both tables are ignored.
    Raises:
      CheckpointError: a table that is missing, out of range, repeats an id, or contradicts the other one.
    """
    if draft_size == target_size:
        return None
    if d2t is None:
        raise CheckpointError(
            f"{where}: tensor d2t is missing; a head of draft_vocab_size {draft_size} for vocab_size {target_size} "
            "needs it"
        )
    ids = np.arange(draft_size, dtype=np.int64) + d2t.astype(np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= target_size))
    if outside.size:
        first = int(outside[0])
        raise CheckpointError(
            f"{where}: d2t maps {outside.size} draft ids out of the vocabulary of {target_size}, "
            f"the first is {first} -> {int(ids[first])}; the file is damaged or was made for another target"
        )
    if len(np.unique(ids)) != draft_size:
        raise CheckpointError(f"{where}: d2t maps several draft ids to one target id; the file is damaged")
    if t2d is not None and not np.array_equal(np.flatnonzero(t2d), np.sort(ids)):
        raise CheckpointError(
            f"{where}: d2t and t2d contradict each other: d2t reaches {draft_size} target ids, t2d marks "
            f"{int(np.count_nonzero(t2d))}, and they are not the same ones; the file is damaged"
        )
    return ids.astype(np.int32)


def official_tables(target_ids: np.ndarray | None, target_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Converts target_ids [Vd] (None: the target's vocabulary) to d2t [Vd] int64 and t2d [V] bool."""
    ids = np.arange(target_size) if target_ids is None else np.asarray(target_ids)
    t2d = np.zeros(target_size, np.bool_)
    t2d[ids] = True
    return ids.astype(np.int64) - np.arange(len(ids), dtype=np.int64), t2d
