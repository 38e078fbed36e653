"""Checkpoints of a run, by orbax: state, place in the data, score; written in the background, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from eagle_jax.train.step import TrainState, state_shardings

NOT_EVALUATED = -1e30  # the score of a checkpoint that was not evaluated


class Checkpoints:
    """A folder of checkpoints: the latest few, and the best by its evaluation."""

    def __init__(self, folder: Path, keep: int):
        def score(metrics: dict[str, float]) -> float:
            return metrics["score"]

        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(get_metric_fn=score, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=score)
        self.manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, state: TrainState, place: dict[str, Any], score: float | None) -> None:
        """Starts to write; `state` may be donated afterwards. score: higher is better; None: not evaluated."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_plain(state)), place=ocp.args.JsonSave({"state": json.dumps(place)})
        )
        self.manager.save(step, args=items, metrics={"score": NOT_EVALUATED if score is None else score})

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the highest score; None where nothing was evaluated."""
        self.manager.wait_until_finished()
        best = self.manager.best_step()
        return None if best is None or self.manager.metrics(best)["score"] == NOT_EVALUATED else best

    def restore(self, step: int, like: TrainState, mesh: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, straight into its shardings on `mesh`, and the place in the data.

        Args:
          like: an abstract state.
        """
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            _plain(like),
            _plain(state_shardings(like, mesh)),
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), place=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=items)
        state = TrainState(**restored["state"])
        return state._replace(key=jax.random.wrap_key_data(state.key)), json.loads(restored["place"]["state"])

    def close(self) -> None:
        """Waits until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _plain(state: TrainState) -> dict[str, Any]:
    """A state as orbax stores it: keys as their data."""
    values = state._asdict()
    if isinstance(state.key, jax.sharding.Sharding):
        return values
    if isinstance(state.key, jax.ShapeDtypeStruct):
        return values | {"key": jax.eval_shape(jax.random.key_data, state.key)}
    return values | {"key": jax.random.key_data(state.key)}
