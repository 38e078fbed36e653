import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import BestExpansions, policy
from tests.tree import oracle
from tests.tree.test_best_prefixes import paths_of
from tests.tree.test_dynamic import assert_well_formed


def by_heap(children, config):
    """JetSpec's loop. children(path) -> [(token, log-probability)], best first. -> sorted [(path, score)]."""
    added, heap = [((), np.float32(0))], [(np.float32(0), 0)]
    while len(added) < config.num_nodes:
        _, node = heapq.heappop(heap)  # of equal scores the first added
        path, score = added[node]
        if len(path) == config.depth:
            continue
        for token, log_prob in children(path)[: min(config.top_k, config.num_nodes - len(added))]:
            heapq.heappush(heap, (-np.float32(score + log_prob), len(added)))
            added.append(((*path, token), np.float32(score + log_prob)))
    return sorted(added[1:])


def ranked(log_probs, ids):
    """The children of a node by descending log-probability, ties by draft id."""
    return [(int(ids[token]), log_probs[token]) for token in np.argsort(-log_probs, kind="stable")]


@pytest.mark.parametrize(
    "config",
    [
        BestExpansions(1, 5, 6),
        BestExpansions(5, 4, 24),  # the last expansion adds three
        BestExpansions(3, 3, 40),  # all there are
        BestExpansions(8, 1, 9),  # a chain
        BestExpansions(15, 2, 40),
    ],
    ids=str,
)
@pytest.mark.parametrize("values", [4, 1000], ids=["ties", "few ties"])
def test_the_tree_is_that_of_a_heap(config, values, monkeypatch):
    """128 sequences a case, with few different log-probabilities, so that the order of adding decides."""
    monkeypatch.setattr(policy, "log_probabilities", lambda logits: logits)  # which would round them
    rng = np.random.default_rng(values)
    batch, vocab = 128, 12
    log_probs = -rng.integers(0, values, (batch, config.depth, vocab)).astype(np.float32) / 8
    log_probs[::7] *= 40  # deep trees
    log_probs[::11, :, 2:] = -np.inf
    ids = rng.permutation(100)[:vocab].astype(np.int32)

    def grow(root, log_probs, ids):
        def draft_fn(carry, step):
            return jax.lax.dynamic_index_in_dim(log_probs, step.level + 1, axis=1), carry

        return config.grow(root, log_probs[:, 0], (), draft_fn, ids)[0]

    tree = jax.jit(grow)(jnp.arange(batch, dtype=jnp.int32), log_probs, ids)
    assert_well_formed(tree, config)
    for row in range(batch):
        expected = by_heap(lambda path, row=row: ranked(log_probs[row, len(path)], ids), config)
        assert paths_of(tree, row) == expected


def test_a_draft_with_children_of_each_nodes_own():
    """Every node is scored by its own path, as with an EAGLE head."""
    config, vocab = BestExpansions(4, 3, 21), 6
    draft = oracle.ToyDraft(0, vocab, 40)
    logits = jnp.broadcast_to(jnp.asarray(draft.logits([]), jnp.float32), (2, vocab))
    tree, _ = config.grow(
        jnp.array([3, 7], jnp.int32), logits, draft.carry(2, config), draft.draft_fn, jnp.asarray(draft.target_ids)
    )
    assert_well_formed(tree, config)
    expected = by_heap(
        lambda path: ranked(oracle.log_softmax(draft.logits(list(path))).astype(np.float32), draft.target_ids), config
    )
    for row in range(2):
        assert [path for path, _ in paths_of(tree, row)] == [path for path, _ in expected]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2, 4), "BestExpansions.depth must be a positive integer"),
        ((2, True, 4), "BestExpansions.top_k must be a positive integer"),
        ((2, 2, 1), "BestExpansions.num_nodes must be an integer of at least 2"),
        ((2, 3, 14), "num_nodes = 14 is more than depth = 2 and top_k = 3 can draft: at most 13"),
        ((4, 5, 16), "depth = 4 is deeper than 16 nodes with top_k = 5 reach: at most 3"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        BestExpansions(*sizes)


def test_a_small_vocabulary():
    with pytest.raises(ValueError, match="top_k = 8 exceeds the draft vocabulary of 7 tokens"):
        BestExpansions(1, 8, 9).grow(jnp.zeros(1, jnp.int32), jnp.zeros((1, 7)), (), lambda carry, step: None)
