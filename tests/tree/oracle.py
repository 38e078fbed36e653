"""NumPy oracles of the tree code, written from ALGORITHM rather than from the package, and a toy draft."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.tree import DraftStep, TreeConfig, TreePolicy


class ToyDraft:
    """A draft whose logits depend on the whole path: U tanh(sum of embeddings of the node and its ancestors).

    The JAX version finds the ancestors through `step.mask`, the NumPy one by walking the path.
    """

    def __init__(self, seed: int, vocab: int, target_vocab: int, scale: float = 3.0, width: int = 5):
        rng = np.random.default_rng(seed)
        self.embed = rng.normal(size=(target_vocab, width)).astype(np.float32)
        self.unembed = (scale * rng.normal(size=(width, vocab))).astype(np.float32)
        self.target_ids = np.sort(rng.permutation(target_vocab)[:vocab]).astype(np.int32)

    def logits(self, path: list[int]) -> np.ndarray:
        """Returns logits [V] for the children of the last node of `path` (target ids below the root; may be empty)."""
        return np.tanh(self.embed[path].sum(axis=0, dtype=np.float64)) @ self.unembed.astype(np.float64)

    def carry(self, batch: int, config: TreePolicy) -> jax.Array:
        return jnp.zeros((batch, (config.depth - 1) * config.width), jnp.int32)

    def draft_fn(self, drafted: jax.Array, step: DraftStep) -> tuple[jax.Array, jax.Array]:
        """Drafts a level. drafted: [B, M], the tokens of every step so far."""
        drafted = jax.lax.dynamic_update_slice(drafted, step.tokens, (0, step.level * step.tokens.shape[1]))
        embedded = jnp.asarray(self.embed)[drafted]
        hidden = jnp.tanh(jnp.einsum("bkm,bmd->bkd", step.mask.astype(jnp.float32), embedded))
        return hidden @ jnp.asarray(self.unembed)[None], drafted


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def best(scores: list[float], count: int) -> list[int]:
    """Returns the indices of the largest scores in descending order; ties by index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def grow(draft: ToyDraft, config: TreeConfig, root: int) -> dict[str, list]:
    """Grows the dynamic tree, candidate by candidate; returns lists of tokens, parents, depths and scores."""
    k = config.top_k
    candidates: list[dict] = []  # flat order

    def propose(parent: int | None) -> None:
        path = [] if parent is None else candidates[parent]["path"]
        score = 0.0 if parent is None else candidates[parent]["score"]
        log_probs = log_softmax(draft.logits(path))
        for choice in best(list(log_probs), k):
            token = int(draft.target_ids[choice])
            candidates.append({"path": [*path, token], "score": score + log_probs[choice], "parent": parent})

    propose(None)
    level = list(range(k))
    for _ in range(config.depth - 1):
        first = len(candidates)
        for beam in level:
            propose(beam)
        level = [first + i for i in best([c["score"] for c in candidates[first:]], k)]
    kept = sorted(best([c["score"] for c in candidates], config.num_nodes - 1))
    node = {None: 0} | {flat: 1 + i for i, flat in enumerate(kept)}
    return {
        "tokens": [root] + [candidates[i]["path"][-1] for i in kept],
        "parents": [-1] + [node[candidates[i]["parent"]] for i in kept],
        "depths": [0] + [len(candidates[i]["path"]) for i in kept],
        "scores": [0.0] + [candidates[i]["score"] for i in kept],
    }


def random_tree(
    rng: np.random.Generator, num_nodes: int, vocab: int, max_depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, parents and depths [N] of a random tree; siblings may repeat a token."""
    parents, depths = np.full(num_nodes, -1, np.int32), np.zeros(num_nodes, np.int32)
    for i in range(1, num_nodes):
        parents[i] = rng.choice([j for j in range(i) if depths[j] < max_depth])
        depths[i] = depths[parents[i]] + 1
    return rng.integers(0, vocab, num_nodes).astype(np.int32), parents, depths


def ancestors(parents: np.ndarray) -> np.ndarray:
    mask = np.zeros((len(parents), len(parents)), bool)
    for i in range(len(parents)):
        node = i
        while node >= 0:
            mask[i, node] = True
            node = parents[node]
    return mask


def accept_greedy(tokens: np.ndarray, parents: np.ndarray, logits: np.ndarray) -> tuple[list[int], int]:
    """Returns the path of the deepest agreeing node (the first of equals) and the bonus token."""

    def path(node: int) -> list[int]:
        return [node] if parents[node] < 0 else [*path(parents[node]), node]

    choice = logits.argmax(axis=-1)
    agreeing = [
        p for p in map(path, range(len(tokens))) if all(tokens[b] == choice[a] for a, b in itertools.pairwise(p))
    ]
    longest = max(agreeing, key=len)  # max keeps the first of equals
    return longest, int(choice[longest[-1]])
