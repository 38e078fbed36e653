"""Batches of a run by grain, in a fixed order with random access: resuming needs no replay of earlier batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eagle_jax.sharding import BATCH
from eagle_jax.train.data.dataset import Dataset

Batch = dict[str, np.ndarray]
EPOCHS = 2**20  # practically infinite: grain cannot mix infinite datasets


def batches(
    dataset: Dataset,
    rows: Mapping[int, Sequence[Sequence[int]]],
    batch_rows: Mapping[int, int],
    seed: int,
    *,
    features: Callable[[int, np.ndarray], Batch] | None = None,
    blocks: Sequence[int] = (0,),
    of: int = 1,
) -> grain.MapDataset:
    """Returns infinite batches, reshuffled every epoch. Iterators of `to_iter_dataset` save and restore their position.

    Args:
      rows: {row length: documents of each row}. batch_rows: {row length: global batch size}.
      features: returns precomputed features for a row length and indices into rows[length].
      blocks: the shards of each batch, of `of` equal ones, that this process reads; see `own_blocks`.
    Returns:
      Batches {"tokens", "loss_mask", "documents": [rows, S], "lengths": [rows]}, int32, and the features.
    """
    parts, weights = [], []
    for number, (width, own) in enumerate(sorted(rows.items())):
        count = batch_rows[width]

        def made(chosen: np.ndarray, width: int = width, own: Sequence[Sequence[int]] = own) -> Batch:
            parts_of_batch = np.split(chosen, of)
            mine = np.concatenate([parts_of_batch[block] for block in blocks])
            made_rows = [dataset.row(own[index], width) for index in mine]
            batch = {name: np.stack([row[name] for row in made_rows]) for name in made_rows[0]}
            return batch if features is None else batch | features(width, mine)

        indices = grain.MapDataset.range(len(own)).seed(seed + number).shuffle().repeat(EPOCHS)
        parts.append(indices.batch(count).map(made))
        weights.append(len(own) / count)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, np.divide(weights, sum(weights)).tolist())


def iterator(dataset: grain.MapDataset) -> Any:
    """Returns an iterator that prefetches in a thread, with `get_state` and `set_state`."""
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def steps_of(rows: Mapping[int, Sequence[Any]], batch_rows: Mapping[int, int], epochs: float) -> int:
    """Returns the number of steps in `epochs` passes over the rows."""
    return max(1, round(epochs * sum(len(own) / batch_rows[width] for width, own in rows.items())))


def own_blocks(mesh: Mesh) -> tuple[list[int], int]:
    """Returns the batch shards on this process's devices, in order, and the total number of shards."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    count = math.prod(mesh.shape[axis] for axis in BATCH)
    held = sharding.addressable_devices_indices_map((count,)).values()
    return sorted({index[0].indices(count)[0] for index in held if index}), count


def on_mesh(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Assembles a global sharded batch from each process's shards."""

    def place(array):
        spec = PartitionSpec(BATCH, *[None] * (array.ndim - 1))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array)

    return {name: place(array) for name, array in batch.items()}
