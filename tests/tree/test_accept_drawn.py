"""accept_drawn keeps the target's distribution: by enumeration of the draft's draws and of the rule's outcomes.

A case is p and q after every text, and a static tree. Every way to draw the children at the nodes is a row of a batch.
The rule is a black box: a proposal's probability of acceptance is found by bisection over its own uniform, with the
uniforms before it scripted to lead there, as in test_accept_sampling.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import StaticTree, Tree, accept_drawn, accept_sampled, accept_sampling
from tests.tree import oracle

V = 4
ALMOST_1 = np.float32(1 - 2**-24)  # the largest uniform

TREES = {
    "two levels": StaticTree([[0], [1], [0, 0], [0, 1]]),
    "below the second": StaticTree([[0], [1], [0, 0], [1, 0]]),
    "three children": StaticTree([[0], [1], [2]]),
    "all children": StaticTree([[0], [1], [2], [3]]),
    "chain": StaticTree.chain(3),
}
CASES = 40  # of each tree, one for each pair of kinds below

drawn = jax.jit(accept_drawn)


def distributions(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """[*shape, V] of multiples of 2^-12, which float32 holds and sums without rounding."""
    weights = np.exp(rng.normal(size=(*shape, V)) * {"flat": 0.1, "sharp": 3.0}.get(kind, 1.0))
    if kind in ("zeros", "one"):
        order = rng.random((*shape, V)).argsort(axis=-1)
        weights = np.where(order < (1 if kind == "one" else 2), weights, 0)
    weights = np.floor(weights / weights.sum(axis=-1, keepdims=True) * 2**12)
    rest = 2**12 - weights.sum(axis=-1, keepdims=True)
    weights += rest * np.eye(V)[weights.argmax(axis=-1)]
    return weights / 2**12


def tables(rng: np.random.Generator, depth: int, kinds: list[str]) -> list[np.ndarray]:
    """Of each length 0, ..., depth: the distributions [V, ..., V] after every text of that length, of these kinds."""
    result = []
    for length in range(depth + 1):
        kind = rng.choice(kinds, size=(V,) * length)
        options = {name: distributions(rng, (V,) * length, name) for name in kinds if name not in ("same", "none")}
        table = np.zeros((V,) * (length + 1))  # "none": chosen without chance
        for name, option in options.items():
            table = np.where((kind == name)[..., None], option, table)
        result.append(np.where((kind == "same")[..., None], np.nan, table))
    return result


class Draws:
    """Every way to draw a tree's children: rows, each an order of tokens at every node with children.

    tokens [R, N]; weight [R] under q; tried [R, N]: q held the token, or it was chosen without chance.
    When q has no token left, `fill` [V] says in which order tokens follow.
    """

    def __init__(self, tree: StaticTree, q: list[np.ndarray], fill: np.ndarray):
        self.parents = np.array([-1, *(tree.node_of[path[:-1]] for path in tree.paths)])
        self.depths = np.array([0, *map(len, tree.paths)])
        self.below = [np.flatnonzero(self.parents == node).tolist() for node in range(tree.num_nodes)]
        inner = [node for node in range(tree.num_nodes) if self.below[node]]
        orders = [itertools.permutations(range(V), len(self.below[node])) for node in inner]
        rows = list(itertools.product(*orders))
        self.tokens = np.zeros((len(rows), tree.num_nodes), np.int32)
        for place, node in enumerate(inner):
            self.tokens[:, self.below[node]] = [row[place] for row in rows]

        self.weight, self.tried = np.ones(len(rows)), np.zeros((len(rows), tree.num_nodes), bool)
        rank = np.argsort(fill)
        for node in inner:
            at = self.at(q, node)
            nothing = ~at.any(axis=1)
            left = np.ones_like(at, bool)  # tokens not yet drawn
            for child in self.below[node]:
                token = self.tokens[:, child]
                weights = np.where(left, at, 0)
                mass = weights.sum(axis=1)
                first = np.where(left, rank, V).argmin(axis=1)
                chance = self.of(weights, token) / np.where(mass > 0, mass, 1)
                self.weight *= np.where(mass > 0, chance, token == first)
                self.tried[:, child] = nothing | (self.of(at, token) > 0)
                left &= np.arange(V) != token[:, None]
        np.testing.assert_allclose(self.weight.sum(), 1)

    def path(self, node: int) -> list[int]:
        """Without the root."""
        return [] if node == 0 else [*self.path(self.parents[node]), node]

    def at(self, values: list[np.ndarray], node: int) -> np.ndarray:
        """[R, ...]: those after the text of the node."""
        index = tuple(self.tokens[:, n] for n in self.path(node))
        return values[len(index)][index] if index else np.repeat(values[0][None], len(self.tokens), axis=0)

    @staticmethod
    def of(values: np.ndarray, token: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, token[:, None], axis=1)[:, 0]

    def script(self, node: int, before: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Uniforms [R, N - 1] that lead to a node and reject its children, and how many come before the child."""
        rows, count = self.tokens.shape
        uniforms, place = np.full((rows, count), ALMOST_1), np.zeros(rows, int)
        path = self.path(node)
        for parent, child in zip([0, *path], [*path, before], strict=True):
            for sibling in self.below[parent]:
                if sibling == child:
                    break
                place += self.tried[:, sibling]
            if child is not None and child != before:
                uniforms[np.arange(rows), place] = 0
                place += self.tried[:, child]
        return uniforms[:, :-1], np.minimum(place, count - 2)


class Outcomes:
    """accept [R, N]: the probability that a proposal is accepted when it is tried. residual [R, N, V]."""

    def __init__(self, draws: Draws, p: list[np.ndarray], q: list[np.ndarray]):
        rows, nodes = draws.tokens.shape
        probs, draft_probs = (
            np.stack([draws.at(table, node) for node in range(nodes)], axis=1).astype(np.float32) for table in (p, q)
        )
        # One row of the batch for each way to draw and node: [R * N]
        self.shape = rows, nodes
        repeat = [np.repeat(values, nodes, axis=0) for values in (draws.tokens, probs, draft_probs)]
        parents, depths = (np.broadcast_to(x, (rows * nodes, nodes)) for x in (draws.parents, draws.depths))
        tree = Tree(repeat[0], parents, depths, np.zeros((rows * nodes, nodes), np.float32))
        self.arguments = jax.device_put((tree, *repeat[1:]))

        scripts = [draws.script(draws.parents[node], before=node) for node in range(1, nodes)]
        scripts = [(np.full((rows, nodes - 1), ALMOST_1), np.zeros(rows, int)), *scripts]
        uniforms, place = (np.stack(values, axis=1) for values in zip(*scripts, strict=True))
        low, high = np.zeros((rows, nodes)), np.ones((rows, nodes))
        for _ in range(25):
            middle = (low + high) / 2
            np.put_along_axis(uniforms, place[..., None], np.minimum(middle, ALMOST_1)[..., None], axis=2)
            path = self.rule(uniforms)[0]  # [R, N, N]
            accepted = (path == np.arange(nodes)[None, :, None]).any(axis=-1)
            low, high = np.where(accepted, middle, low), np.where(accepted, high, middle)
        accept = np.where(low > 1 - 2**-23, 1.0, np.where(high < 2**-24, 0.0, (low + high) / 2))
        self.accept = np.where(draws.tried, accept, 0)

        uniforms = np.stack([draws.script(node)[0] for node in range(nodes)], axis=1)
        path, self.residual = self.rule(uniforms)
        self.end = np.max(path, axis=-1, where=path >= 0, initial=0)

    def rule(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        acceptance, residual = jax.device_get(
            drawn(*self.arguments, uniforms.reshape(-1, uniforms.shape[-1]).astype(np.float32))
        )
        assert (acceptance.bonus == -1).all()
        return acceptance.path.reshape(*self.shape, -1), residual.reshape(*self.shape, V)


def plain(p: list[np.ndarray], length: int, more: int) -> np.ndarray:
    """[V, ..., V], length + more: the law of the next tokens after every text of a length."""
    if more == 0:
        return np.ones((V,) * length)
    return p[length].reshape(*p[length].shape, *[1] * (more - 1)) * plain(p, length + 1, more - 1)


def text_law(draws: Draws, outcomes: Outcomes, p: list[np.ndarray], node: int, more: int) -> np.ndarray:
    """[R, V, ..., V]: the law of the next tokens when the walk stands at a node; after a bonus token they follow p."""
    rows = np.arange(len(draws.tokens))
    law, left = np.zeros((len(rows), *[V] * more)), np.ones(len(rows))
    if more == 0:
        return law + 1
    wide = (-1, *[1] * (more - 1))
    for child in draws.below[node]:
        accept = outcomes.accept[:, child]
        law[rows, draws.tokens[:, child]] += (left * accept).reshape(wide) * text_law(
            draws, outcomes, p, child, more - 1
        )
        left = left * (1 - accept)
    # [R, V, ..., V] of the tokens after each bonus.
    depth = draws.depths[node]
    index = tuple(draws.tokens[:, n] for n in draws.path(node))
    after = plain(p, depth + 1, more - 1)
    after = after[index] if index else np.repeat(after[None], len(rows), axis=0)
    return law + left.reshape(-1, *[1] * more) * outcomes.residual[:, node].reshape(-1, V, *[1] * (more - 1)) * after


KINDS = ["any", "flat", "sharp", "zeros", "one"]
P_KINDS = [["any"], ["flat"], ["sharp"], ["zeros"], KINDS]
Q_KINDS = [["any"], ["flat"], ["sharp"], ["zeros"], ["one"], ["same"], ["none"], [*KINDS, "same", "none"]]


@pytest.mark.parametrize("name", TREES)
def test_the_output_distribution_is_the_target_s(name):
    tree = TREES[name]
    met = dict.fromkeys(("certain", "refused", "between", "not tried", "chosen", "beyond p"), 0)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        p = tables(rng, tree.depth, P_KINDS[seed % len(P_KINDS)])
        q = tables(rng, tree.depth, Q_KINDS[seed % len(Q_KINDS)])
        q = [np.where(np.isnan(ours), theirs, ours) for ours, theirs in zip(q, p, strict=True)]
        draws = Draws(tree, q, rng.permutation(V))
        outcomes = Outcomes(draws, p, q)
        np.testing.assert_allclose(outcomes.residual.sum(axis=-1), 1, atol=1e-5)

        more = tree.depth + 1
        law = text_law(draws, outcomes, p, 0, more)
        law = np.tensordot(draws.weight, law, axes=1)
        np.testing.assert_allclose(law, plain(p, 0, more), atol=1e-6)

        possible = draws.weight > 0
        if draws.below[0] == [1] and q[0].any():  # a chain: the first token is accepted as often as can be
            accepted = (draws.weight * outcomes.accept[:, 1]).sum()
            np.testing.assert_allclose(accepted, np.minimum(p[0], q[0]).sum(), atol=1e-6)
        first = outcomes.accept[possible][:, 1]
        met["certain"] += bool((first == 1).any())
        met["refused"] += bool((first == 0).any())
        met["between"] += bool(((first > 0) & (first < 1)).any())
        met["not tried"] += not draws.tried[possible][:, 1:].all()
        met["chosen"] += not q[0].any()
        met["beyond p"] += bool(((q[0] > 0) & (p[0] == 0)).any())
    if name == "chain":
        assert met.pop("not tried") == 0
    assert min(met.values()) >= 3, met


# Special cases


def batch_of(trees: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Tree:
    tokens, parents, depths = (np.stack(values) for values in zip(*trees, strict=True))
    return Tree(*map(jnp.asarray, (tokens, parents, depths)), jnp.zeros(tokens.shape))


def random_batch(seed: int, rows: int, nodes: int, vocab: int) -> tuple[Tree, np.ndarray, np.ndarray]:
    """Trees without duplicate siblings, p [B, N, V] and uniforms [B, N - 1]."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(rows):
        tokens, parents, depths = oracle.random_tree(rng, nodes, vocab, nodes)
        for parent in range(nodes):
            below = np.flatnonzero(parents == parent)
            tokens[below] = rng.permutation(vocab)[: len(below)]
        trees.append((tokens, parents, depths))
    p = np.asarray(jax.nn.softmax(2 * rng.normal(size=(rows, nodes, vocab)).astype(np.float32), axis=-1))
    return batch_of(trees), p, rng.random((rows, nodes - 1), np.float32)


def test_children_chosen_without_chance_are_accepted_as_sampling_does():
    rows, nodes, vocab = 1024, 7, 8
    tree, p, uniforms = random_batch(0, rows, nodes, vocab)
    ours, our_residual = drawn(tree, p, np.zeros_like(p), uniforms)
    theirs, their_residual = jax.jit(accept_sampling)(tree, p, uniforms)
    for field in ("path", "length", "bonus"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
    np.testing.assert_allclose(our_residual, their_residual, atol=1e-5)
    assert len(set(np.asarray(ours.length).tolist())) >= 4


def test_a_draft_equal_to_the_target_is_always_accepted():
    tree, p, uniforms = random_batch(1, 1024, 7, 8)
    acceptance, residual = drawn(tree, p, p, np.full_like(uniforms, ALMOST_1))
    rows = jax.device_get((tree.parents, acceptance.path, acceptance.length, residual))
    for row, (parents, path, length, left) in enumerate(zip(*rows, strict=True)):
        firsts = [0]
        while (below := np.flatnonzero(parents == firsts[-1])).size:
            firsts.append(below[0])
        assert path[: length + 1].tolist() == firsts
        np.testing.assert_array_equal(left, p[row, firsts[-1]])


def test_rows_do_not_share_uniforms_or_probabilities():
    tree, p, uniforms = random_batch(2, 64, 7, 8)
    q = p[::-1].copy()
    q[::3] = 0
    together, residual = drawn(tree, p, q, uniforms)
    order = np.random.default_rng(0).permutation(64)
    shuffled, other = drawn(jax.tree.map(lambda x: x[order], tree), p[order], q[order], uniforms[order])
    np.testing.assert_array_equal(shuffled.path, together.path[order])
    np.testing.assert_array_equal(other, residual[order])


def test_the_sampled_rule_hands_on_what_the_tree_was_drawn_from():
    """p = q accepts all; without q, the likeliest children are rejected now and then."""
    tree, p, _ = random_batch(1, 1024, 7, 8)
    keys = jax.random.split(jax.random.key(0), 1024)
    sampled = jax.jit(accept_sampled)
    with_q = sampled(tree, jnp.log(p), keys, jax.nn.softmax(jnp.log(p), axis=-1))
    everything, _ = drawn(tree, p, p, np.zeros((1024, 6), np.float32))
    np.testing.assert_array_equal(with_q.path, everything.path)
    assert ((with_q.bonus >= 0) & (with_q.bonus < 8)).all()
    assert (sampled(tree, jnp.log(p), keys).length < with_q.length).any()


def test_a_forbidden_token_is_refused_even_for_a_uniform_of_0():
    tree, p, uniforms = random_batch(3, 1024, 7, 8)
    forbidden = tree.tokens[:, 1:2]  # the root's first child
    p = p.copy()
    np.put_along_axis(p[:, 0], np.asarray(forbidden), 0, axis=1)
    q = np.full_like(p, 1 / 8)
    q[::2] = 0
    acceptance, residual = drawn(tree, p, q, np.zeros_like(uniforms))
    assert (acceptance.path[:, 1] != 1).all() and (acceptance.path[:, 1] > 1).any()
    at_root = np.asarray(acceptance.length) == 0
    assert (np.take_along_axis(np.asarray(residual), np.asarray(forbidden), axis=1)[at_root] == 0).all()


def test_a_residual_of_nothing_falls_back_on_p():
    """Rounding: q exceeds p by one step of float32 at the token drawn and nowhere falls below it."""
    tree = batch_of([tuple(np.array(x, np.int32) for x in ([0, 2], [-1, 0], [0, 1]))])
    p = np.full((1, 2, 3), np.float32(0.3333333))
    q = p.copy()
    q[0, 0, 2] = np.nextafter(p[0, 0, 2], np.float32(1))
    acceptance, residual = drawn(tree, p, q, np.full((1, 1), ALMOST_1))
    assert acceptance.length[0] == 0
    np.testing.assert_array_equal(residual[0], p[0, 0])
