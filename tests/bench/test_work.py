"""Bytes and FLOPs of decoding against numbers worked out by hand, and against the arrays of real models."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench.decode.work import Cycle, Work, cycle_work, plain_work, verify_work
from bench.shapes import SHAPES, abstract_pair
from eagle_jax import BestPrefixes, TreeConfig
from eagle_jax.decode.cycle import verify
from eagle_jax.decode.state import empty_state
from eagle_jax.models import params
from eagle_jax.tree import Tree

TREE = TreeConfig(depth=8, top_k=10, num_nodes=60)
LLAMA_8B, HEAD_8B = SHAPES["8b"].target, SHAPES["8b"].head


def test_a_plain_step_of_8b_reads_its_layers_and_lm_head():
    # A layer: q and o 4096 x 4096, k and v 1024 x 4096, the MLP three times 14336 x 4096, two norms.
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
    weights = 2 * (32 * layer + 128256 * 4096)
    assert weights == pytest.approx(15.0e9, rel=0.002)
    # A position of the cache: 8 heads of 128, keys and values, 32 layers, 2 bytes: 131072. One more is written.
    assert plain_work(LLAMA_8B, 1, 0).bytes == weights + 2 * 4096 + 131072
    assert plain_work(LLAMA_8B, 4, 1000).bytes == weights + 4 * (2 * 4096 + 1001 * 131072)
    # A multiplication and an addition a weight; norms are no products.
    products = 2 * (32 * (layer - 2 * 4096) + 128256 * 4096)
    assert plain_work(LLAMA_8B, 1, 0).flops == products + 4 * 4096 * 32
    assert plain_work(LLAMA_8B, 3, 99).flops == 3 * (products + 100 * 4 * 4096 * 32)


def test_a_draft_step_of_8b_reads_its_layer_and_lm_head():
    # q reads 8192 and gives 4096, k and v 1024 each; o 4096 x 4096; the MLP; norms of 3 x 4096.
    layer = 8192 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 14336 * 4096 + 3 * 4096
    output = 32000 * 4096
    assert 2 * layer == pytest.approx(0.49e9, rel=0.01) and 2 * output == pytest.approx(0.26e9, rel=0.01)
    work = cycle_work(LLAMA_8B, HEAD_8B, TREE, 1, 0)
    # Ten tokens' embeddings; ten rows of 4096 bytes written and 30 of the steps before read.
    assert work.step.bytes == 2 * (layer + output) + 10 * 2 * 4096 + (10 + 30) * 4096
    assert work.step.bytes == pytest.approx(0.75e9, rel=0.01)
    assert work.propose.bytes == 2 * output + 7 * work.step.bytes
    fc = 4096 * 3 * 4096
    assert work.extend.bytes == 2 * (fc + layer) + 9 * (2 * 4096 + 4096)
    assert work.commit == Work(2 * 9 * 131072, 0)


def test_a_cycle_of_8b_costs_1_4_plain_tokens_at_batch_1():
    cycle = cycle_work(LLAMA_8B, HEAD_8B, TREE, 1, 0)
    assert cycle.total.bytes / plain_work(LLAMA_8B, 1, 0).bytes == pytest.approx(1.40, abs=0.01)
    assert cycle.total == cycle.propose + cycle.verify + cycle.commit + cycle.extend
    assert sum(part.bytes for part in cycle.parts.values()) == cycle.total.bytes


def test_weights_are_those_of_the_models():
    """Without a context and with one token, all but the embedding, the new rows and the integer table is weights."""
    for name, shape in SHAPES.items():
        target, head = abstract_pair(shape)
        sizes = {path: leaf.size for path, leaf in params.flatten(target).items()}
        if not shape.target.tie_word_embeddings:
            del sizes["embed"]
        t, h = shape.target, shape.head
        new = t.hidden_size + 2 * t.num_kv_heads * t.head_dim * t.num_layers
        norm = t.hidden_size  # the final one, a few KB, is left out of the formula
        assert plain_work(t, 1, 0, itemsize=1).bytes == sum(sizes.values()) - norm + new, name
        leaves = params.flatten(head)
        own = sum(leaf.size for path, leaf in leaves.items() if path not in ("target_ids", "norm", "fc"))
        # A chain of two: one step of one token, which finds no earlier one.
        step = cycle_work(t, h, TreeConfig(depth=2, top_k=1, num_nodes=2), 1, 0, itemsize=1).step
        assert step.bytes == own + h.hidden_size + 2 * h.num_kv_heads * h.head_dim, name


def weights_of(kind: str, *less: str) -> tuple[Any, int]:
    """The config of a head for the 8B target, and the numbers in its weights but those of some paths."""
    head = abstract_pair(SHAPES["8b"], head=kind)[1]
    return head.config, sum(leaf.size for path, leaf in params.flatten(head).items() if path not in less)


def chain_of_one(kind: str) -> Cycle:
    config, _ = weights_of(kind)
    return cycle_work(LLAMA_8B, config, BestPrefixes(depth=1, num_nodes=2), 1, 0)


def test_a_cycle_of_a_block_of_8b_runs_its_head_once():
    """A chain of one: a block of two tokens, which reads all weights of the head but those of the features, once."""
    features, kv = (5 * 4096 + 2) * 4096, 2 * 8 * 128 * 5  # fc and the norms before and after the layers
    config, weights = weights_of("dflash")
    chain = chain_of_one("dflash")
    assert chain.propose.bytes == 2 * (weights - features + 128256 * 4096 + 2 * 4096 + 2 * kv)
    assert chain.extend.bytes == 2 * (features - 2 * 4096 + kv * 4096 + 2 * kv)
    tree = cycle_work(LLAMA_8B, config, BestPrefixes(depth=15, num_nodes=64), 1, 0)
    assert tree.propose.bytes < 1.001 * chain.propose.bytes and tree.step == tree.propose
    assert tree.total.bytes == pytest.approx(18.5e9, rel=0.01)
    eagle3 = cycle_work(LLAMA_8B, HEAD_8B, TREE, 1, 0)
    assert tree.total.bytes < 0.92 * eagle3.total.bytes


def test_a_cycle_of_dspark_reads_its_markov_head_once_a_depth():
    """A chain of one has a block of one token. The confidence head is read where there is a threshold."""
    features, kv, embedding = (5 * 4096 + 2) * 4096, 2 * 8 * 128 * 5, 128256 * 256
    config, weights = weights_of("dspark", "confidence", "confidence_bias")
    chain = chain_of_one("dspark")
    assert chain.propose.bytes == 2 * (weights - features - embedding + 256 + 128256 * 4096 + 4096 + kv)
    dflash, _ = weights_of("dflash")
    more = [
        cycle_work(LLAMA_8B, head, tree, 1, 0).propose
        for tree in (BestPrefixes(7, 32), BestPrefixes(6, 32))
        for head in (config, dflash)
    ]
    # W2 [V, 256] at 31 nodes, and their rows of W1; and the block's token and its row of logits less.
    assert more[0].bytes - more[2].bytes == more[1].bytes - more[3].bytes + 2 * (embedding + 31 * 256)
    assert more[0].flops - more[2].flops == pytest.approx(more[1].flops - more[3].flops + 2 * 31 * embedding, rel=1e-3)
    sure = dataclasses.replace(config, confidence_threshold=0.5)
    found = cycle_work(LLAMA_8B, sure, BestPrefixes(7, 32), 1, 0).propose
    assert found.bytes - more[0].bytes == 7 * 2 * (4096 + 256)


def test_a_cycle_of_p_eagle_reads_its_layers_once():
    """Whatever the depth, its pass has a row for every depth, which follow the newly committed ones."""
    config, weights = weights_of("peagle", "embed", "lm_head", "target_ids", "norm", "mask_hidden")
    kv = 2 * 8 * 128 * 4
    chain = chain_of_one("peagle")
    assert chain.propose.bytes == 2 * 32000 * 4096
    assert chain.extend.bytes == 2 * (weights + (2 + 7) * 4096 + 2 * kv)
    tree = cycle_work(LLAMA_8B, config, BestPrefixes(8, 64), 1, 0)
    assert tree.propose.bytes == chain.propose.bytes
    assert tree.extend.bytes == chain.extend.bytes + 2 * 7 * (4096 + kv)


def test_flops_are_those_that_the_compiler_counts():
    """XLA's own count of a verify pass's products, which are nearly all of its arithmetic."""
    shape, batch, nodes = SHAPES["1b"].with_layers(2), 2, 16
    target, _ = abstract_pair(shape)
    state = jax.eval_shape(lambda target: empty_state(target, None, batch, 96), target)
    tree = Tree(*(jax.ShapeDtypeStruct((batch, nodes), dtype) for dtype in [jnp.int32] * 3 + [jnp.float32]))

    def run(target, state, tree):
        out, logits = verify(target, None, state, tree)
        return logits, out.new_kv

    counted = jax.jit(run).lower(target, state, tree).cost_analysis()["flops"]
    ours = verify_work(shape.target, nodes, batch, context=state.cache.rows).flops
    assert counted == pytest.approx(ours, rel=0.02)


def test_the_limit_is_the_slower_of_moving_and_computing():
    assert Work(8e9, 1e9).seconds(4e9, 1e12) == 2
    assert Work(8e9, 4e12).seconds(4e9, 1e12) == 4
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)
