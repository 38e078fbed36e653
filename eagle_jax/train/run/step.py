"""One training step: gradients with micro-batch accumulation, and the optimizer's update of float32 master weights.

Master weights are a flat {path: array} dictionary. The optimizer's state has the same paths, so one table of rules
shards both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eagle_jax.drafts.dflash import DFlash
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.p_eagle import PEagle
from eagle_jax.models import params
from eagle_jax.models.target import Target
from eagle_jax.sharding import path_sharding
from eagle_jax.train.loss.dflash import DFlashObjective
from eagle_jax.train.loss.objective import Batch, Eagle1Objective, Eagle3Objective, Metrics, Objective, drawn
from eagle_jax.train.loss.p_eagle import PEagleObjective

Arrays = dict[str, jax.Array]
Head = TypeVar("Head", Eagle1Draft, Eagle3Draft, PEagle, DFlash)
FROZEN = ("embed", "target_ids")  # of a head: the target's embedding, and the ids of the draft vocabulary


class TrainState(NamedTuple):
    """The state that steps update. key: of the run; step s uses fold_in(key, s)."""

    step: jax.Array
    masters: Arrays
    optimizer: Any
    key: jax.Array


def split(model: Any, frozen: tuple[str, ...]) -> tuple[Arrays, Arrays]:
    """Splits a model's arrays into float32 master weights and the frozen ones."""
    arrays = params.flatten(model)
    kept = {path: array for path, array in arrays.items() if path in frozen}
    return {path: array.astype(jnp.float32) for path, array in arrays.items() if path not in kept}, kept


def train_step(
    state: TrainState,
    model: Any,
    frozen: Arrays,
    target: Target | None,
    batch: Batch,
    *,
    objective: Objective,
    update: optax.GradientTransformation,
    pieces: int = 1,
) -> tuple[TrainState, Metrics]:
    """Takes one step. Pure; jit it and donate `state`.

    Args:
      model: the trained module, may be abstract. frozen: its arrays that are not in state.masters.
      target: of a head, held constant; None if a target is trained.
      batch: arrays [B, ...].
      pieces: number of micro-batches, which divides B; affects rounding only.
    Returns:
      The new state, and the metrics of the batch with "grad_norm", the norm before clipping.
    """
    key = jax.random.fold_in(state.key, state.step)

    def prepare(piece):
        return objective.prepare(params.load(model, state.masters | frozen), target, piece)

    draw = functools.partial(drawn, objective, model)
    gradient = functools.partial(_gradient, objective, model, state.masters, frozen, target)
    if pieces == 1:
        prepared = draw(prepare(batch), key)
        result = gradient(prepared, objective.counts(prepared), key)
    else:
        # Sequence i goes to micro-batch i % pieces: no sequence moves to another device.
        split_rows = {name: jnp.swapaxes(a.reshape(-1, pieces, *a.shape[1:]), 0, 1) for name, a in batch.items()}
        keys = jax.random.split(key, pieces)
        prepared = jax.vmap(draw)(jax.lax.map(prepare, split_rows), keys)
        counts = jax.tree.map(lambda c: c.sum(axis=0), jax.vmap(objective.counts)(prepared))

        def add(total, piece):
            return jax.tree.map(jnp.add, total, gradient(piece[0], counts, piece[1])), None

        first = jax.tree.map(lambda value: value[0], prepared)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, first, counts, key))
        result, _ = jax.lax.scan(add, zeros, (prepared, keys))
    gradients, metrics = result
    with jax.named_scope("optimizer"):
        updates, optimizer = update.update(gradients, state.optimizer, state.masters)
        masters = optax.apply_updates(state.masters, updates)
    new = TrainState(state.step + 1, masters, optimizer, state.key)
    return new, metrics | {"grad_norm": optax.tree.norm(gradients)}


def _gradient(
    objective: Objective, model: Any, masters: Arrays, frozen: Arrays, target: Target | None, prepared, counts, key
) -> tuple[Arrays, Metrics]:
    def of(masters):
        return objective.sums(params.load(model, masters | frozen), target, prepared, counts, key)

    (_, metrics), gradient = jax.value_and_grad(of, has_aux=True)(masters)
    return gradient, metrics


def initial_state(masters: Arrays, update: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.int32(0), masters, update.init(masters), jax.random.key(seed))


def optimizer_state(
    draft: Eagle1Draft | Eagle3Draft | DFlash, optimizer: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    """Returns the state that `optimizer_step` starts from: float32 copies of the head's weights, and the optimizer's.

    Args:
      seed: of the noise that EAGLE-1's objective adds to the features, and of what DFlash's and P-EAGLE's draw.
    """
    masters, _ = split(draft, FROZEN)
    return initial_state(jax.tree.map(jnp.copy, masters), optimizer, seed)


def optimizer_step(
    draft: Head,
    state: TrainState,
    target: Target,
    tokens: jax.Array,
    lengths: jax.Array,
    loss_mask: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    objective: Eagle1Objective | Eagle3Objective | PEagleObjective | DFlashObjective,
    documents: jax.Array | None = None,
    micro_batches: int = 1,
) -> tuple[Head, TrainState, Metrics]:
    """Takes one optimizer step of a draft head on sequences such as rollouts. Runs the target, which stays constant.

    Pure, with the mathematics of `eagle-jax train`. New weights of `draft` and `target` do not recompile it:

        step = jax.jit(optimizer_step, static_argnames=("optimizer", "objective"), donate_argnames="state")

    Args:
      draft: a head of EAGLE-3, of EAGLE-1 and EAGLE-2, of P-EAGLE or of DFlash. Its embedding and vocabulary stay.
      state: see `optimizer_state`. It holds the float32 master weights, of which the returned head is a copy in the
        dtypes of `draft`; so steps smaller than bfloat16's rounding add up.
      tokens: [B, S] right-padded. lengths: [B].
      loss_mask: [B, S], 1 for the tokens to learn, 0 for the others, such as those of a prompt.
      objective: the loss: `Eagle3Objective()`, `Eagle1Objective()`, `PEagleObjective()` or `DFlashObjective()`. Its
        dtype None means that of `draft`.
      documents: [B, S], a number for each document where a sequence packs several; None: one.
      micro_batches: number of gradient-accumulation steps, which divides B; affects rounding only.
    Returns:
      The head, the new state, and metrics: "loss", those of the objective, and "grad_norm".
    """
    arrays = params.flatten(draft)
    masters, frozen = split(draft, FROZEN)
    if state.masters.keys() != masters.keys():
        raise ValueError("the state is of another head: make it by optimizer_state(draft, optimizer)")
    if objective.dtype is None:
        objective = dataclasses.replace(objective, dtype=draft.dtype)
    batch = {"tokens": tokens, "lengths": lengths, "loss_mask": loss_mask}
    if documents is not None:
        batch["documents"] = documents
    state, metrics = train_step(
        state, draft, frozen, target, batch, objective=objective, update=optimizer, pieces=micro_batches
    )
    trained = {path: master.astype(arrays[path].dtype) for path, master in state.masters.items()}
    return params.load(draft, trained | frozen), state, metrics


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the shardings of a state, which may be abstract, by the path rules of sharding.py."""

    def of(path, leaf):
        names = [str(getattr(key, "key", "")) for key in path]
        path_of = next((name for name in names if name in state.masters), None)
        if path_of is None or leaf.shape != state.masters[path_of].shape:
            return NamedSharding(mesh, PartitionSpec())
        return path_sharding(path_of, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(of, state)
