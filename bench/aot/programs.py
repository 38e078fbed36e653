"""Programs of the decoder and of training with abstract arguments, to compile for any device or mesh.

Letters: B batch rows, P prompt width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eagle_jax
from bench.aot import hlo
from bench.aot.compilers import compile_lowered, lower_for, text
from bench.shapes import Shape, abstract_pair
from eagle_jax.decode import cycle as decoding
from eagle_jax.models import params
from eagle_jax.sampling import SamplingConfig
from eagle_jax.sharding import DATA, FSDP, TENSOR, path_layout, path_name, path_sharding
from eagle_jax.train.config import OptimizerSettings
from eagle_jax.train.loss.objective import Eagle3Objective
from eagle_jax.train.run import optimizer, step
from eagle_jax.tree import TreeConfig, TreePolicy

# place(argument, mesh) -> the sharding of every leaf, as a tree like the argument.
Place = Callable[[Any, Mesh], Any]


def by_path(model: Any, mesh: Mesh) -> Any:
    """Shards and stores a model, or a dictionary of its arrays, by the path rules of sharding.py, as loading does."""

    def place(path, leaf):
        name = path_name(path)
        return Format(path_layout(name, leaf.shape), path_sharding(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, model)


def by_sequence(state: Any, mesh: Mesh) -> Any:
    """Shards a DecodeState: keys and values by sequence and head; replicates the rest."""
    split = PartitionSpec((DATA, FSDP), TENSOR)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, split if leaf.ndim == 4 else PartitionSpec()), state)


def by_row(batch: Any, mesh: Mesh) -> Any:
    """Shards a training batch by rows."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec((DATA, FSDP))), batch)


def whole(arg: Any, mesh: Mesh) -> Any:
    """Replicates an argument on every chip."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), arg)


PROMPTED: tuple[Place, ...] = (by_path, by_path, whole, whole, whole)  # target, draft, tokens, lengths, key


class Program(NamedTuple):
    """A function to compile.

    args: trees of ShapeDtypeStructs. places: the sharding of each on a mesh. donated: indices of donated arguments.
    made: the DecodeState that it creates and carries through its loops; None if that is an argument.
    loops: whether the repeated work is in its loops; else the program itself is repeated.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    places: tuple[Place, ...]
    donated: tuple[int, ...] = ()
    made: Any = None
    loops: bool = False

    def compile(self, device: Any) -> jax.stages.Compiled:
        """Compiles for a device, or a Mesh with the axes of sharding.py."""
        return compile_lowered(self.lower(device))

    def lower(self, device: Any) -> jax.stages.Lowered:
        """Lowers for a device or a Mesh, without compiling."""
        return lower_for(_first(device), self.fn, *self.placed(device)[:-1], donate_argnums=self.donated)

    def copies(self, compiled: jax.stages.Compiled, device: Any, at_least: int = 2**20) -> list[str]:
        """Finds the weights and caches that it copies repeatedly, such as "bf16[1,8,8320,128]".

        They are recognised by size: a copied array with as many elements as one of them, `at_least` or more.
        """
        leaves = jax.tree.leaves(self.placed(device))
        sizes = {math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) for x in leaves}
        copies = hlo.large_copies(text(compiled), at_least, in_loops=self.loops)
        return [copy for copy in copies if hlo.elements(copy) in sizes]

    def placed(self, device: Any) -> tuple[Any, ...]:
        """Returns the arguments and `made`, with shardings if `device` is a mesh."""
        trees, places = (*self.args, self.made), (*self.places, by_sequence)
        if not isinstance(device, Mesh):
            return trees
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            trees,
            tuple(place(tree, device) for place, tree in zip(places, trees, strict=True)),
        )


def prefill(
    shape: Shape,
    capacity: int,
    prompt: int,
    batch: int = 1,
    sampling: SamplingConfig = SamplingConfig(),
    dtype: Any = jnp.bfloat16,
) -> Program:
    """Returns the prefill of prompts [B, P] into new caches of `capacity` positions: a loop over chunks."""
    fn = functools.partial(eagle_jax.prefill, max_new_tokens=capacity - prompt, sampling=sampling)
    args = (*abstract_pair(shape, dtype), *_prompts(batch, prompt), _key(sampling))
    return Program(fn, args, PROMPTED, made=jax.eval_shape(fn, *args), loops=True)


def cycle(
    shape: Shape,
    capacity: int,
    batch: int = 1,
    sampling: SamplingConfig = SamplingConfig(),
    tree: TreePolicy | None = TreeConfig(),
    head: str = "eagle3",
) -> Program:
    """Returns one cycle with the state donated and no prompt pending; `tree` None: a step of plain decoding.

    Args:
      head: of HEADS.
    """
    target, draft = abstract_pair(shape, head=head)
    draft = None if tree is None else draft
    start = functools.partial(eagle_jax.prefill, max_new_tokens=capacity - 1, sampling=sampling)
    state = jax.eval_shape(start, target, draft, *_prompts(batch, 1), _key(sampling))

    def fn(target, draft, state):
        return decoding.step(target, draft, state, tree=tree or TreeConfig()).state

    return Program(fn, (target, draft, state), (by_path, by_path, by_sequence), donated=(2,))


def generate(
    shape: Shape,
    capacity: int,
    prompt: int,
    batch: int = 1,
    sampling: SamplingConfig = SamplingConfig(),
    dtype: Any = jnp.bfloat16,
) -> Program:
    """Returns `generate`: prefill and the loop over cycles."""
    fn = functools.partial(eagle_jax.generate, max_new_tokens=capacity - prompt, sampling=sampling)
    return prefill(shape, capacity, prompt, batch, sampling, dtype)._replace(fn=fn)


def train_step(shape: Shape, rows: int, width: int, steps: int = 7) -> Program:
    """Returns an update of the head: `rows` rows of `width` tokens, `steps` steps of the training-time test.

    bfloat16 target and products, float32 masters, AdamW.
    """
    target, draft = abstract_pair(shape)
    arrays = params.flatten(draft)
    masters = {
        path: jax.ShapeDtypeStruct(array.shape, jnp.float32)
        for path, array in arrays.items()
        if path not in step.FROZEN
    }
    frozen = {path: array for path, array in arrays.items() if path in step.FROZEN}
    update = optimizer.optimizer(OptimizerSettings(), 100)
    state = jax.eval_shape(functools.partial(step.initial_state, update=update, seed=0), masters)
    batch = {name: jax.ShapeDtypeStruct((rows, width), jnp.int32) for name in ("tokens", "loss_mask", "documents")}
    batch["lengths"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    objective = Eagle3Objective(tuple(0.8**k for k in range(steps)), dtype=jnp.bfloat16)

    def one(state, frozen, target, batch):
        return step.train_step(state, draft, frozen, target, batch, objective=objective, update=update)

    return Program(one, (state, frozen, target, batch), (step.state_shardings, by_path, by_path, by_row), donated=(0,))


def _first(device: Any) -> Any:
    """Returns a device, or the first of a mesh."""
    return device.devices.flat[0] if isinstance(device, Mesh) else device


def _prompts(batch: int, width: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns abstract tokens [B, P] and lengths [B]."""
    return jax.ShapeDtypeStruct((batch, width), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)


def _key(sampling: SamplingConfig) -> Any:
    return None if sampling.greedy else jax.eval_shape(lambda: jax.random.key(0))
