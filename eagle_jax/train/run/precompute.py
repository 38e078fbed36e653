"""Precomputes the target's hidden states of all sequences of a run: `eagle-jax train --precompute`."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np

from eagle_jax.files.lock import locked_folder
from eagle_jax.sharding import make_mesh
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.data import features
from eagle_jax.train.data.features import SHARD_BYTES, Group
from eagle_jax.train.data.loader import on_mesh
from eagle_jax.train.report import Say, SignsOfLife, log, signs_of_life
from eagle_jax.train.run import assemble
from eagle_jax.train.run.assemble import objective_of


def precompute(settings: TrainSettings, folder: Path, say: Say = log, shard_bytes: int = SHARD_BYTES) -> int:
    """Runs the target over all sequences of train and held_out; resumes an earlier call.

    Uses the training micro-batch size, so that features equal those computed online.

    Args:
      shard_bytes: the largest size of a file of features.
    Raises:
      ValueError: for kind target, or on several hosts.
      Locked: while another process writes to the folder.
      FeaturesError, OSError: see `features.write`.
    """
    if settings.kind == "target":
        raise ValueError("--precompute is for heads: a target has no features")
    if jax.process_count() > 1:
        raise ValueError("--precompute runs on one host; the training that reads the folder may run on several")
    with locked_folder(folder, say), signs_of_life(say) as say:
        return _precompute(settings, folder, say, shard_bytes)


def _precompute(settings: TrainSettings, folder: Path, say: SignsOfLife, shard_bytes: int) -> int:
    mesh = make_mesh(settings.mesh.model_dump())
    origin = assemble.source(settings)
    say.doing("preparing the data")
    with locked_folder(Path(settings.output), say):
        splits = assemble.splits(settings, origin, say)
    say.doing("loading the models")
    target = assemble.load_target(settings, mesh)
    head = assemble.new_model(settings, origin, target, splits["train"][0], say)
    objective = objective_of(settings)
    contents = features.contents_of(settings, head, target)
    groups = features.groups_of(settings, splits, contents, shard_bytes)

    @jax.jit
    def run(head, target, batch):
        prepared = objective.prepare(head, target, batch)
        return prepared.features, prepared.answers

    def compute(group: Group, chosen: range) -> np.ndarray:
        """Runs micro-batches of one shape; pads the last by repeating its last sequence."""
        data, rows = splits[group.split]
        own, count = rows[group.length], features.pass_rows(settings, group.length)
        parts = []
        for start in range(chosen.start, chosen.stop, count):
            indices = [min(start + place, chosen.stop - 1) for place in range(count)]
            made = [data.row(own[index], group.length) for index in indices]
            batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
            read, answers = jax.device_get(run(head, target, on_mesh(batch, mesh)))
            whole = np.concatenate([read, answers], axis=-1) if contents.features else answers
            for place, index in enumerate(range(start, min(start + count, chosen.stop))):
                parts.append(whole[place, : group.starts[index + 1] - group.starts[index]])
        return np.concatenate(parts)

    say.doing("computing features")
    began = time.monotonic()
    made = features.made_from(settings, head, target, splits, contents)
    features.write(folder, made, contents, groups, compute, say)
    say(f"features are in {folder} after {time.monotonic() - began:,.0f} s; train with features={folder}")
    return 0
