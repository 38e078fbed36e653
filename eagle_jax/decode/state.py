"""DecodeState: everything that decoding carries from cycle to cycle.

Between cycles a sequence of length n has n - 1 positions in the caches of target and draft: its last token, the root of
the next tree, is chosen but not yet run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float32, Int, Int32, Key

from eagle_jax.decode.plan import PREFILL_CHUNK, cache_positions, ring_margin, scratch_positions
from eagle_jax.drafts.none import NoDraft, as_draft
from eagle_jax.drafts.protocol import Context, Draft
from eagle_jax.keys import row_keys, token_keys
from eagle_jax.models.cache import KVCache, layer_rows
from eagle_jax.models.target import Target
from eagle_jax.ops.arrays import take_one
from eagle_jax.sampling import SamplingConfig
from eagle_jax.sharding import constrain
from eagle_jax.tree import TreeConfig, TreePolicy, choice_noise

# Most tokens of a sequence: positions are int32, with room for a tree and a tile.
MOST_TOKENS = 2**31 - 2**12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The input and the result of a cycle. Donate it.

    All functions preserve the pytree structure, so a service compiles each program once.

    tokens: each prompt and its new tokens, zero-padded.
    lengths: prompt and new tokens so far.
    limits: the length at which a sequence ends.
    done: whether it has ended.
    failed: whether non-finite logits or an impossible prompt ended it.
    cycles: target passes after the prefill.
    accepted: number of cycles that accepted 0, 1, ... draft tokens.
    drafted: which tokens are accepted draft tokens.
    log_probs: of the new tokens; None if they were not asked for.
    keys: None in the greedy program.
    sampling: fields [batch]; None in the greedy program.
    cache: of the target.
    memory: of the draft; None in plain decoding.
    pending: whether `insert` wrote a prompt that the next cycle has to run.
    capacity: most tokens of a sequence.
    """

    tokens: Int32[Array, "batch buffer"]
    lengths: Int32[Array, " batch"]
    limits: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    failed: Bool[Array, " batch"]
    cycles: Int32[Array, " batch"]
    accepted: Int32[Array, "batch scratch"]
    drafted: Bool[Array, "batch buffer"]
    log_probs: Float32[Array, "batch buffer"] | None
    stop_tokens: Int32[Array, " stops"]
    prompt_lengths: Int32[Array, " batch"]
    keys: Key[Array, " batch"] | None
    sampling: SamplingConfig | None
    cache: KVCache
    memory: Any
    pending: Bool[Array, " batch"]
    capacity: int = dataclasses.field(metadata={"static": True})

    @property
    def max_depth(self) -> int:
        """The deepest tree that the scratch positions have room for."""
        return self.accepted.shape[1] - 1

    @property
    def positions(self) -> int:
        """The positions of a sequence that the caches have room for, scratch included."""
        return cache_positions(self.capacity, self.max_depth)

    @property
    def root_position(self) -> Int32[Array, " batch"]:
        """The root's position; 0 in an empty sequence, which is done."""
        return jnp.maximum(self.lengths - 1, 0)

    @property
    def root(self) -> Int32[Array, " batch"]:
        """The last token of each sequence: chosen by the target, but not yet run."""
        return take_one(self.tokens, self.root_position)

    @property
    def draft(self) -> Any:
        """The former name of `memory`."""
        return self.memory


def empty_state(
    target: Target,
    draft: Any | None,
    batch: int,
    capacity: int,
    *,
    sampling: SamplingConfig = SamplingConfig(),
    stop_tokens: tuple[int | Int[Array, ""], ...] | Int[ArrayLike, " stops"] = (),
    tree: TreePolicy | None = None,
    log_probs: bool = False,
    width: int | None = None,
) -> DecodeState:
    """Returns a state whose sequences are all done, for `insert` to fill.

    Args:
      capacity: most tokens (prompt + new) of a sequence, at least 2.
      sampling: default for sequences inserted without their own `sampling`. A greedy state cannot hold sampled
        sequences.
      tree: the deepest tree that `cycle` will get; needed only for depths above MIN_SCRATCH - 1.
      log_probs: whether to record the log-probabilities of new tokens.
      width: columns of `tokens`; default the capacity.
    Raises:
      ValueError: for an invalid capacity, or a cache larger than the memory.
    """
    draft = as_draft(target, draft)
    check_capacity(target, batch, capacity)
    width = capacity if width is None else width
    depth = draft.depth(TreeConfig() if tree is None else tree)
    rows = cache_positions(capacity, depth)
    cache = KVCache.zeros(target.config, batch, rows, target.dtype, ring_margin(depth))
    state = DecodeState(
        tokens=jnp.zeros((batch, width), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        limits=jnp.zeros(batch, jnp.int32),
        done=jnp.ones(batch, bool),
        failed=jnp.zeros(batch, bool),
        cycles=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros((batch, scratch_positions(depth)), jnp.int32),
        drafted=jnp.zeros((batch, width), bool),
        log_probs=jnp.zeros((batch, width), jnp.float32) if log_probs else None,
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        prompt_lengths=jnp.zeros(batch, jnp.int32),
        keys=None if sampling.greedy else row_keys(jax.random.key(0), batch),
        sampling=None if sampling.greedy else sampling.rows(batch),
        cache=cache,
        memory=draft.start(target, batch, rows),
        pending=jnp.zeros(batch, bool),
        capacity=capacity,
    )
    return constrain(state, target)


def check_capacity(target: Target, rows: int, capacity: int) -> None:
    """Raises ValueError if the capacity exceeds int32 positions, or its cache the devices' memory."""
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or capacity < 2:
        got = f"a {type(capacity).__name__}" if not isinstance(capacity, int | np.integer) else capacity
        raise ValueError(f"capacity must be an integer of at least 2 (a prompt token and a new one), got {got}")
    asked = f"{rows} row(s) of up to {capacity} tokens (capacity, by default the prompt's width + max_new_tokens)"
    fix = "lower max_new_tokens, or set capacity"
    if capacity > MOST_TOKENS:
        raise ValueError(f"{asked}: positions end at {MOST_TOKENS}; {fix}")
    config, weight = target.config, target.embed[...]
    if isinstance(weight, jax.core.Tracer) or not isinstance(weight, jax.Array):
        return  # traced or abstract: the program may be compiled for another machine
    token = 2 * config.num_kv_heads * config.head_dim * weight.dtype.itemsize
    cache = rows * sum(layer_rows(config, capacity, PREFILL_CHUNK)) * token
    memory = _memory(weight.sharding.device_set)
    if memory and cache > memory:
        raise ValueError(f"{asked} need a cache of {cache / 1e9:.1f} GB, the memory has {memory / 1e9:.1f} GB; {fix}")


def _memory(devices: Collection[jax.Device]) -> int:
    """Returns the bytes that the devices have in total, 0 if unknown."""
    here = next((device for device in devices if device.process_index == jax.process_index()), None)
    if here is None:
        return 0
    if here.platform == "cpu":  # all CPU devices share the machine's memory
        known = hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
    return len(devices) * (here.memory_stats() or {}).get("bytes_limit", 0)


def context_of(state: DecodeState, vocab_size: int, depth: int = 0) -> Context:
    """Returns the part of the state that a draft may read, with noise for a tree of this depth."""
    noise = None
    if state.sampling is not None and state.sampling.coupled:
        assert state.keys is not None
        noise = choice_noise(token_keys(state.keys, state.lengths, depth + 1), vocab_size)
    return Context(
        tokens=state.tokens,
        lengths=state.lengths,
        prompt_lengths=state.prompt_lengths,
        root=state.root,
        root_position=state.root_position,
        memory=state.memory,
        keys=state.keys,
        sampling=state.sampling,
        noise=noise,
    )


def check_memory(state: DecodeState, draft: Draft) -> None:
    """Raises ValueError if the state was made without a draft, and so has no memory."""
    if state.memory is None and not isinstance(draft, NoDraft):
        raise ValueError("the state was prefilled without a draft; pass the draft to prefill too")


def map_rows(fn: Callable[..., Array], state: DecodeState, *others: DecodeState) -> DecodeState:
    """Maps `fn` over all arrays with a batch axis, that is all but stop_tokens."""

    def change(path, array, *rest):
        return array if path[0] == jax.tree_util.GetAttrKey("stop_tokens") else fn(array, *rest)

    return jax.tree_util.tree_map_with_path(change, state, *others)


def take_row(state: DecodeState, row: int | Int[ArrayLike, ""]) -> DecodeState:
    """Returns the state of one sequence, as a batch of 1."""
    # A gather: on a sharded array dynamic_slice would all-gather the batch axis first.
    return map_rows(lambda x: jnp.take(x, jnp.asarray(row, jnp.int32)[None], axis=0, mode="clip"), state)


def put_row(state: DecodeState, row: int | Int[Array, ""], one: DecodeState) -> DecodeState:
    """Replaces one sequence by a batch of 1."""
    return map_rows(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0), state, one)
