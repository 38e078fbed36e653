import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import BestPrefixes, best_prefixes
from tests.tree import oracle
from tests.tree.test_dynamic import assert_well_formed


def by_heap(log_probs, ids, count):
    """DDTree's search: pops the best prefix, and pushes its first child and its next sibling. -> [(path, score)]."""
    ranked = [np.argsort(-of_depth, kind="stable") for of_depth in log_probs]
    popped = []  # (path of tokens, score, depth)

    def push(parent, rank):
        path, score, depth = ((), np.float32(0), 0) if parent < 0 else popped[parent]
        if depth < len(log_probs) and rank < len(ids):
            token = ranked[depth][rank]
            score = np.float32(score + log_probs[depth][token])
            heapq.heappush(heap, (-score, depth + 1, parent, rank, (*path, int(ids[token]))))

    heap: list = []
    push(-1, 0)
    while len(popped) < count:
        score, depth, parent, rank, path = heapq.heappop(heap)
        popped.append((path, -score, depth))
        push(len(popped) - 1, 0)
        push(parent, rank + 1)
    return sorted((path, score) for path, score, _ in popped)


def paths_of(tree, row):
    """-> [(path of tokens, score)] of all nodes but the root."""
    tokens, parents, scores = (np.asarray(values)[row] for values in (tree.tokens, tree.parents, tree.scores))
    paths = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], int(token)))
    return sorted(zip(paths[1:], scores[1:], strict=True))


@pytest.mark.parametrize(
    "config", [BestPrefixes(1, 6), BestPrefixes(4, 16), BestPrefixes(6, 33), BestPrefixes(15, 20)], ids=str
)
@pytest.mark.parametrize("values", [4, 1000], ids=["ties", "few ties"])
def test_the_set_is_that_of_a_heap(config, values, monkeypatch):
    """128 rows a case, with few different log-probabilities: where sums are equal, the parents decide."""
    monkeypatch.setattr(best_prefixes, "log_probabilities", lambda logits: logits)  # which would round them
    rng = np.random.default_rng(values)
    batch, vocab = 128, 36
    log_probs = -rng.integers(0, values, (batch, config.depth, vocab)).astype(np.float32) / 8
    log_probs[::7] *= 40  # deep trees
    log_probs[::11, :, 5:] = -np.inf
    ids = rng.permutation(100)[:vocab].astype(np.int32)

    def grow(root, log_probs, ids):
        def draft_fn(carry, step):
            return jax.lax.dynamic_index_in_dim(log_probs, step.level + 1, axis=1), carry

        return config.grow(root, log_probs[:, 0], (), draft_fn, ids)[0]

    tree = jax.jit(grow)(jnp.arange(batch, dtype=jnp.int32), log_probs, ids)
    assert_well_formed(tree, config)
    for row in range(batch):
        assert paths_of(tree, row) == by_heap(log_probs[row], ids, config.num_nodes - 1)


def test_a_draft_with_children_of_each_nodes_own():
    """Every prefix is scored by its own path, as with an EAGLE head."""
    config, vocab = BestPrefixes(3, 6), 6
    draft = oracle.ToyDraft(0, vocab, 40)
    logits = jnp.broadcast_to(jnp.asarray(draft.logits([]), jnp.float32), (2, vocab))
    tree, _ = config.grow(
        jnp.array([3, 7], jnp.int32), logits, draft.carry(2, config), draft.draft_fn, jnp.asarray(draft.target_ids)
    )
    assert_well_formed(tree, config)
    found = level = [((), np.float32(0))]  # every prefix, and its score
    for _ in range(config.depth):
        level = [
            ((*path, int(token)), score + log_prob)
            for path, score in level
            for token, log_prob in zip(draft.target_ids, oracle.log_softmax(draft.logits(list(path))), strict=True)
        ]
        found = found + level
    found.sort(key=lambda prefix: -prefix[1])
    expected = sorted(path for path, _ in found[1 : config.num_nodes])
    assert [path for path, _ in paths_of(tree, 0)] == [path for path, _ in paths_of(tree, 1)] == expected


@pytest.mark.parametrize(("depth", "nodes"), [(0, 4), (2, 1), (2.0, 4), (True, 4)])
def test_impossible_sizes(depth, nodes):
    with pytest.raises(ValueError, match=r"BestPrefixes\.(depth must be a positive|num_nodes must be an) integer"):
        BestPrefixes(depth, nodes)


def test_a_small_vocabulary():
    with pytest.raises(ValueError, match="num_nodes = 9 exceeds the draft vocabulary of 7 tokens"):
        BestPrefixes(2, 9).grow(jnp.zeros(1, jnp.int32), jnp.zeros((1, 7)), (), lambda carry, step: None)
