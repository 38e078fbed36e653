"""Times the parts of decoding by `seconds_of`: the library's functions, at a state whose caches are filled.

Letters: B batch, D tree depth, N nodes. Values are random: times do not depend on them, and acceptance is meaningless.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax import Draft, Target, TreeConfig
from eagle_jax.decode.commit import newly_committed
from eagle_jax.decode.cycle import propose, step, verify
from eagle_jax.decode.state import DecodeState, context_of, empty_state
from eagle_jax.measure.timing import seconds_of
from eagle_jax.measure.tuning_blocks import in_one_pass
from eagle_jax.models.cache import KVCache, take_tokens
from eagle_jax.tree import TreePolicy
from eagle_jax.tree.accept import argmax


@functools.partial(jax.jit, static_argnames=("batch", "context", "tree"))
def filled_state(target: Target, draft: Draft, *, batch: int, context: int, tree: TreePolicy) -> DecodeState:
    """Makes a greedy state with `context` positions of every sequence in both caches, and room for one cycle.

    Args:
      draft: one whose memory is a cache, as DFlash's is, or holds one, as an EAGLE head's does.
    """
    state = empty_state(target, draft, batch, context + 1 + tree.depth + 1, tree=tree)
    keys = jax.random.split(jax.random.key(0), 4)
    state = dataclasses.replace(
        state,
        tokens=jax.random.randint(keys[0], state.tokens.shape, 0, target.config.vocab_size),
        limits=jnp.full(batch, state.capacity, jnp.int32),
        prompt_lengths=jnp.full(batch, context, jnp.int32),
        cache=_filled(state.cache, keys[1]),
        memory=_with(
            state.memory,
            _filled(_cache(state.memory), keys[2]),
            jax.tree.map(lambda x: jax.random.normal(keys[3], x.shape, x.dtype), _hidden(state.memory)),
        ),
    )
    return _rewound(state, context)


def measure_parts(
    target: Target, draft: Draft, state: DecodeState, context: int, tree: TreePolicy, repeats: int
) -> dict[str, float]:
    """Times a plain step, a cycle, and its parts.

    Args:
      state: from `filled_state` with this context and tree; donated.
    Returns:
      Seconds by the names of bench/decode/work.py.
    """
    found: dict[str, float] = {}
    models = target, draft
    for name, head in (("plain", None), ("cycle", draft)):
        advance = functools.partial(_advance, context, tree)
        found[name], _, state = seconds_of(advance, (target, head), (), state, repeats)

    fixed, reads = (*models, state), (state.tokens, _hidden(state.memory))
    found["propose"], nodes, _ = seconds_of(functools.partial(_grow, tree), fixed, reads, (), repeats)
    found["step"] = found["propose"]
    if not in_one_pass(draft):  # a step a level
        assert isinstance(tree, TreeConfig)
        first = TreeConfig(depth=1, top_k=tree.top_k, num_nodes=min(tree.num_nodes, tree.top_k + 1))
        without_steps, *_ = seconds_of(functools.partial(_grow, first), fixed, reads, (), repeats)
        found["step"] = (found["propose"] - without_steps) / (tree.depth - 1)
    found["verify"], (_, out), _ = seconds_of(_check, (*fixed, nodes), nodes.tokens, (), repeats)

    # As in a cycle that accepts D tokens; times do not depend on which nodes they are.
    path = jnp.broadcast_to(jnp.arange(tree.depth + 1), (nodes.tokens.shape[0], tree.depth + 1))
    cache, memory, lengths = state.cache, state.memory, jnp.array(state.cache.length)
    before = dataclasses.replace(state, cache=KVCache([], [], lengths), memory=None)
    del state, fixed, reads  # these caches are donated from here on
    found["extend"], *_ = seconds_of(_learn, (*models, before, nodes, path), out._replace(new_kv=()), memory, repeats)
    found["commit"], *_ = seconds_of(_commit, (out.new_kv, lengths), path, cache, repeats)
    return found


# Parts for `seconds_of`: fixed arguments, those with a false dependency on the previous run, and donated ones.


def _advance(context, tree, models, _, state):
    target, draft = models
    return (), _rewound(step(target, draft, state, tree=tree).state, context)


def _grow(tree, fixed, reads, kept):
    (target, draft, state), (tokens, hidden) = fixed, reads
    state = dataclasses.replace(state, tokens=tokens, memory=_with(state.memory, _cache(state.memory), hidden))
    return propose(target, draft, context_of(state, target.config.vocab_size), tree).tree, kept


def _check(fixed, tokens, kept):
    target, draft, state, nodes = fixed
    out, logits = verify(target, draft, state, dataclasses.replace(nodes, tokens=tokens))
    return (argmax(logits), out), kept


def _learn(fixed, out, memory):
    target, draft, before, nodes, path = fixed
    new, count = jnp.take_along_axis(nodes.tokens, path, axis=1), jnp.full(path.shape[0], path.shape[1], jnp.int32)
    # The hidden states stand for the logits, which a head does not read.
    committed = newly_committed(before, nodes, out, out.hidden, path, new, count)
    memory = draft.update(target, memory, committed)
    return _cache(memory).k[-1][0, 0, 0], memory


def _commit(fixed, path, cache):
    new_kv, length = fixed
    cache = cache.write(take_tokens(new_kv, path), length)
    return cache.k[-1][0, 0, 0], cache


def _cache(memory: Any) -> KVCache:
    return memory if isinstance(memory, KVCache) else memory.cache


def _hidden(memory: Any) -> Any:
    """Returns the hidden states that a memory holds beside its cache; () if it is the cache alone."""
    return () if isinstance(memory, KVCache) else memory.hidden


def _with(memory: Any, cache: KVCache, hidden: Any) -> Any:
    return cache if isinstance(memory, KVCache) else dataclasses.replace(memory, cache=cache, hidden=hidden)


def _filled(cache: KVCache, key: jax.Array) -> KVCache:
    """Fills a cache with random keys and values, in distinct arrays: they are donated together."""
    arrays, tree = jax.tree.flatten((cache.k, cache.v))
    values = jax.random.normal(key, max(array.shape for array in arrays), arrays[0].dtype)
    filled = [array + values[:, :, : array.shape[2]] / (1 + index) for index, array in enumerate(arrays)]
    k, v = jax.tree.unflatten(tree, filled)
    return dataclasses.replace(cache, k=k, v=v)


def _rewound(state: DecodeState, context: int) -> DecodeState:
    """Sets every sequence of a state back to `context` cached positions and one pending token."""
    length = jnp.full_like(state.lengths, context)
    return dataclasses.replace(
        state,
        lengths=length + 1,
        done=jnp.zeros_like(state.done),
        failed=jnp.zeros_like(state.failed),
        cache=state.cache.with_length(length),
        memory=_with(state.memory, _cache(state.memory).with_length(length), _hidden(state.memory)),
    )
