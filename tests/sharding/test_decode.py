"""Decoding on eight devices writes the tokens of one, and every device holds its part of models and caches."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import eagle_jax
from eagle_jax import Llama, SamplingConfig, StaticTree, TreeConfig
from eagle_jax.convert import from_pretrained
from eagle_jax.decode.cycle import step
from eagle_jax.models.cache import KVCache
from eagle_jax.models.config import ExpertsConfig
from eagle_jax.serving import Request, RunningBatch, serve
from eagle_jax.sharding import CACHE_RULE, fitting, make_mesh
from tests.sharding.meshes import mesh_of, on_mesh
from tests.toy import (
    GOLDEN,
    NEW,
    TARGET,
    TREE,
    golden_pair,
    near_ties,
    random_eagle3,
    rows_of,
    scaled,
    small_case,
)

# Of rows 0 and 1 the likeliest tokens, of rows 2 and 3 drawn ones: two programs in one.
MIXED = SamplingConfig(temperature=jnp.array([0.0, 0.0, 0.8, 1.0]), top_p=jnp.array([1.0, 1.0, 1.0, 0.9]))
STATIC = StaticTree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
KEY = jax.random.key(3)
# draft, data and tensor devices, tree, sampling
CASES = {
    "eagle3": ("t1_eagle3_dv96", 4, 2, TreeConfig(depth=4, top_k=3, num_nodes=12), MIXED),
    # neither t1's two key-value heads divide by 4, nor t2's vocabulary of 199: they lie whole on every device
    "eagle1": ("t2_eagle1_bias", 2, 4, STATIC, SamplingConfig()),
    "plain": (None, 2, 4, TREE, MIXED),
}


def prompts(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocab, (4, 16)).astype(np.int32)
    return tokens, np.array([16, 3, 9, 1], np.int32)


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_write_what_one_does(name):
    draft, data, tensor, tree, sampling = CASES[name]
    family = "t1" if draft is None else draft[:2]
    target, head = golden_pair(draft or "t1_eagle3_dv96", f"{family}_target")
    weights = GOLDEN / "weights"
    pair = from_pretrained(
        weights / f"{family}_target",
        None if draft is None else weights / draft,
        dtype=jnp.float32,
        mesh=jax.make_mesh((data, tensor), ("data", "tensor")),  # JAX's own kind of axes, Explicit
    )
    tokens, lengths = prompts(target.config.vocab_size)
    options: dict[str, Any] = dict(tree=tree, sampling=sampling, max_new_tokens=24)
    one = eagle_jax.generate(target, None if draft is None else head, tokens, lengths, KEY, **options)
    many = eagle_jax.generate(*pair, tokens, lengths, KEY, **options)
    assert many.tokens.sharding.is_fully_replicated and len(many.tokens.sharding.device_set) == 8
    assert near_ties(target, rows_of(many), rows_of(one), name) == 0
    np.testing.assert_array_equal(many.accepted, one.accepted)


@pytest.fixture(scope="module")
def case():
    """The toy pair (4 heads of 2 key-value heads, 97 tokens) on one device and on data 4, tensor 2."""
    target, draft, *_ = small_case()
    mesh = mesh_of(4, 2)
    return (target, draft), (on_mesh(target, mesh), on_mesh(draft, mesh))


def texts(pair, prompts: list[list[int]]) -> list[list[int]]:
    """Every prompt's text: 4 slots, each taking the next prompt as soon as it is free."""
    batch = RunningBatch(*pair, slots=4, capacity=40, tree=TREE, buckets=(16,))
    requests = [Request(prompt, max_new_tokens=NEW, id=index) for index, prompt in enumerate(prompts)]
    found = {answer.request.id: [*answer.request.prompt, *answer.tokens] for answer in serve(batch, requests, cycles=2)}
    for cache in batch.state.cache.k + batch.state.draft.cache.v:
        assert len(cache.addressable_shards) in (1, 8)
        assert cache.addressable_shards[0].data.shape[:2] == ((4, 2) if len(cache.addressable_shards) == 1 else (1, 1))
    return [found[index] for index in range(len(prompts))]


def test_slots_of_a_running_batch_take_new_prompts(case):
    one, many = case
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 97, length).tolist() for length in (5, 15, 1, 9, 3, 7)]
    assert near_ties(one[0], texts(many, prompts), texts(one, prompts)) == 0


def test_chunks_of_a_stream_are_whole_on_every_device(case):
    tokens, lengths = prompts(97)
    texts = [[], []]
    for pair, text in zip(case, texts, strict=True):
        for chunk in eagle_jax.stream(*pair, tokens, lengths, tree=TREE, max_new_tokens=NEW, cycles_per_chunk=2):
            assert chunk.tokens.is_fully_replicated
            text.append(jax.device_get((chunk.tokens, chunk.counts)))
    jax.tree.map(np.testing.assert_array_equal, *texts)


def test_a_cycle_moves_no_cache(case):
    """Each device holds its part of the state, which is donated; no collective carries rows of a cache."""
    _, (target, draft) = case
    start = jax.jit(eagle_jax.prefill, static_argnames="max_new_tokens")
    state = start(target, draft, *prompts(97), max_new_tokens=NEW)
    assert all(array.is_fully_replicated for array in (state.tokens, state.lengths, state.done, state.cache.length))
    cycle = jax.jit(lambda *args: step(*args, tree=TREE).state, donate_argnums=2)
    compiled = cycle.lower(target, draft, state).compile()
    memory, caches = compiled.memory_analysis(), [*state.cache.k, *state.cache.v, *state.draft.cache.k]
    whole = sum(array.nbytes for array in caches)
    assert memory.argument_size_in_bytes < whole / 8 + sum(a.nbytes for a in jax.tree.leaves((target, draft)))
    assert memory.alias_size_in_bytes > whole / 8
    collective = re.compile(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(")
    moved = collective.findall(compiled.as_text())
    assert moved and not [shapes for shapes in moved if f"{state.cache.rows},8]" in shapes]


def test_rings_are_written_by_every_device_for_itself():
    """Sequences at places of their own, some past the ring's end."""
    config = dataclasses.replace(TARGET, windows=(5, None, 9))
    empty = KVCache.zeros(config, 4, 256, jnp.float32, ring_margin=8)
    k, v = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2, 6, 8)), jnp.float32)
    write = jax.jit(lambda cache, start: cache.write([(k, v)] * 3, start))
    mesh = mesh_of(4, 2)
    many = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, fitting(CACHE_RULE[: x.ndim], x.shape, mesh))), empty
    )
    assert empty.rings == (5, None, 9)
    for start in (np.array([0, 124, 250, 127]), jnp.int32(125)):
        one, sharded = write(empty, start), write(many, start)
        assert sharded.k[0].addressable_shards[0].data.shape == (1, 1, 128, 8)
        jax.tree.map(np.testing.assert_array_equal, one, jax.device_get(sharded))
        for position in range(6):
            place = np.broadcast_to(start + position, 4)
            np.testing.assert_array_equal(one.k[2][np.arange(4), :, place % 128], k[:, :, position])
        assert (np.asarray(one.k[2]).any(axis=(1, 3)).sum(axis=1) == 6).all()


WINDOWS = dataclasses.replace(TARGET, windows=(5, None, 130), max_position_embeddings=1024)
EXPERTS = ExpertsConfig(4, 2, 12, bias=True, clamp=(1.702, 2.0))
# As gpt-oss and as Gemma 2: a config, devices of the mesh, sampling.
WINDOWED = {
    "sinks and experts": (
        dataclasses.replace(WINDOWS, sinks=True, experts=EXPERTS, qkv_bias=True),
        dict(data=2, expert=2, tensor=2),
        MIXED,
    ),
    "caps and norms of outputs": (
        dataclasses.replace(
            WINDOWS,
            attention_softcap=20.0,
            logit_softcap=30.0,
            activation="gelu_pytorch_tanh",
            norm_plus_one=True,
            output_norms=True,
            embedding_scale=4.0,
        ),
        dict(data=4, tensor=2),
        SamplingConfig(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_targets_on_a_mesh_write_what_they_do_on_one_device(name):
    """Prompts longer than the windows and than the shortest ring; one text passes that ring's end while it decodes."""
    config, axes, sampling = WINDOWED[name]
    one = scaled(Llama(config, jax.random.key(0)), 6.0), random_eagle3(1, scale=6.0)
    many = tuple(on_mesh(model, make_mesh(axes)) for model in one)
    tokens, lengths = np.random.default_rng(0).integers(0, 97, (4, 400), dtype=np.int32), np.array([400, 3, 375, 290])
    options: dict[str, Any] = dict(tree=TREE, sampling=sampling, max_new_tokens=NEW)
    expected, found = (eagle_jax.generate(*pair, tokens, lengths, KEY, **options) for pair in (one, many))
    assert expected.accepted[:, 1:].sum() > 0
    assert rows_of(found) == rows_of(expected)
    np.testing.assert_array_equal(found.accepted, expected.accepted)
    start = jax.jit(eagle_jax.prefill, static_argnames="max_new_tokens")
    rings = start(*many, tokens, lengths, KEY, sampling=sampling, max_new_tokens=NEW).cache.k[0]
    assert rings.shape == (4, 2, 384, 8) and rings.addressable_shards[0].data.shape == (4 // axes["data"], 1, 384, 8)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((8, 4, 128, 8), dict(data=4, tensor=2), ("data", "tensor", None, None)),
        ((6, 4, 128, 8), dict(data=4, tensor=8), (None, None, None, None)),
        ((8, 4, 128, 8), dict(data=2, fsdp=2, tensor=2), (("data", "fsdp"), "tensor", None, None)),
        ((8, 4, 128, 8), dict(tensor=2), (None, "tensor", None, None)),
    ],
)
def test_where_a_cache_lies(shape, axes, spec):
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    assert fitting(CACHE_RULE, shape, mesh) == jax.sharding.PartitionSpec(*spec)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"mesh \{'data': 4, 'tensor': 4\} needs 16 devices, there are 8"):
        mesh_of(4, 4)
