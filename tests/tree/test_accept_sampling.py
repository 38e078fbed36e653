"""The sampled acceptance rules: exact by enumeration, and equal to the reference on scripted uniforms.

The rule is a black box here. A proposal's probability of acceptance is found by bisection over its own uniform, with
the uniforms before it scripted to lead there; so every outcome of the rule, and its probability, is enumerated.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax import SamplingConfig
from eagle_jax.decode.accept import seen_tokens
from eagle_jax.sampling import process
from eagle_jax.tree import Tree, accept_coupled, accept_sampled, accept_sampling, choice_noise
from tests import processors
from tests.toy import GOLDEN
from tests.tree import oracle

N, V = 8, 5
ALMOST_1 = np.float32(1 - 2**-24)  # the largest uniform

rule = jax.jit(accept_sampling)


@jax.jit
def processed(tree: Tree, logits, text, length, sampling):
    state = SimpleNamespace(tokens=text[None], lengths=length[None])
    return process(logits[None], sampling, lambda: seen_tokens(state, tree, V))[0]


def tree_of(tokens, parents, depths, rows: int = 1) -> Tree:
    fields = (jnp.asarray(np.broadcast_to(x, (rows, len(x)))) for x in (tokens, parents, depths))
    return Tree(*fields, jnp.zeros((rows, len(tokens))))


CONTROLS = {
    "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.5]),
    "top_k": st.integers(1, V),
    "top_p": st.sampled_from([0.2, 0.5, 0.9]),
    "min_p": st.sampled_from([0.05, 0.3]),
    "repetition_penalty": st.sampled_from([0.5, 2.0, 4.0]),
}
SHAPES = {"bushy": 2, "any": N, "chain": N}  # most levels; a chain has one node on each


@st.composite
def cases(draw):
    """A tree, logits at its nodes, a text before it and the controls; the exact distributions p [N, V], float64."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = draw(st.sampled_from(list(SHAPES)))
    tokens, parents, depths = oracle.random_tree(rng, N, V, SHAPES[shape])  # five tokens: duplicates abound
    if shape == "chain":
        parents = depths = np.arange(N, dtype=np.int32)
        parents = parents - 1
    logits = rng.normal(size=(N, V)) * draw(st.sampled_from([0.0, 1.0, 3.0]))
    if draw(st.booleans()):  # one token certain, at about half of the nodes
        logits[rng.random(N) < 0.5, rng.integers(V)] += 60
    # Multiples of 2^-10: biases and penalties are then exact, so that what is compared is the rule, not float32.
    logits = (np.round(logits * 1024) / 1024).astype(np.float32)
    controls = draw(
        st.one_of(
            *(st.fixed_dictionaries({name: values}) for name, values in CONTROLS.items()),
            st.fixed_dictionaries({}, optional=CONTROLS),
        )
    )
    controls = {"temperature": 1.0} | controls
    forbid = draw(st.booleans())
    bias = np.where(rng.random(V) < 0.4, -np.inf, rng.integers(-2048, 2048, V) / 1024) if forbid else np.zeros(V)
    bias[rng.integers(V)] = 0.0  # one token is allowed
    text = rng.integers(0, V, 3).astype(np.int32)
    text[-1] = tokens[0]

    p = np.zeros((N, V))
    mask = oracle.ancestors(parents)
    for node in range(N):
        seen = {*text.tolist(), *tokens[mask[node]].tolist()}
        p[node] = processors.probabilities(logits[node], **controls, logit_bias=bias, seen=seen)
    sampling = SamplingConfig(**controls, logit_bias=bias.astype(np.float32))
    tree = (tokens, parents, depths)
    logits = processed(tree_of(*tree), jnp.asarray(logits), jnp.asarray(text), jnp.int32(3), sampling)
    return tree, np.asarray(logits), p


def children(tree, node: int) -> list[int]:
    """The proposals that are tried at a node, in order: of equal tokens the first."""
    tokens, parents, _ = tree
    below = [child for child in range(1, N) if parents[child] == node]
    return [c for i, c in enumerate(below) if tokens[c] not in tokens[below[:i]]]


def script(tree, node: int, before: int | None = None) -> list[float]:
    """Uniforms that lead to a node and then reject its children: all, or those before one."""
    steps: list[float] = []
    parents = tree[1]
    if node > 0:
        steps = [*script(tree, int(parents[node]), before=node), 0.0]
    for child in children(tree, node):
        if child == before:
            break
        steps.append(ALMOST_1)
    return steps


def test_the_output_distribution_is_the_target_s():
    kinds = dict.fromkeys(("cases", "saturated", "forbidden", "duplicates", "leaves"), 0)
    settings(max_examples=1000)(given(cases(), st.just(kinds))(check_the_distribution))()
    assert kinds["cases"] >= 1000 and min(kinds.values()) >= 100, kinds


def check_the_distribution(case, kinds):
    """Enumerates the rule's outcomes on one case, and counts what kinds of case were met."""
    tree, logits, exact = case
    tokens, parents, _ = tree
    rows = tree_of(*tree, rows=N)
    probs = jnp.broadcast_to(jax.nn.softmax(jnp.asarray(logits), axis=-1), (N, N, V))
    tried = [c for c in range(1, N) if c in children(tree, parents[c])]
    lead = {c: script(tree, int(parents[c]), before=c) for c in tried}

    # r[c]: the probability that proposal c is accepted when it is tried. One row of the batch bisects one proposal.
    low, high = np.zeros(N), np.ones(N)
    for _ in range(25):
        middle = (low + high) / 2
        u = np.full((N, N - 1), ALMOST_1, np.float32)
        for c, steps in lead.items():
            u[c, : len(steps) + 1] = [*steps, min(middle[c], ALMOST_1)]
        path = np.asarray(rule(rows, probs, u)[0].path)
        accepted = (path == np.arange(N)[:, None]).any(axis=1)
        low, high = np.where(accepted, middle, low), np.where(accepted, high, middle)
    r = np.where(low > 1 - 2**-23, 1.0, np.where(high < 2**-24, 0.0, (low + high) / 2))

    # The residual at every node, all of its proposals rejected. One row ends at one node.
    u = np.full((N, N - 1), ALMOST_1, np.float32)
    for node in range(N):
        steps = script(tree, node)
        u[node, : len(steps)] = steps
    acceptance, residual = jax.device_get(rule(rows, probs, u))
    assert (acceptance.bonus == -1).all()

    reach, text_probability = np.zeros(N), np.zeros(N)  # of a node: by the rule, and by the target
    reach[0] = text_probability[0] = 1.0
    for node in range(N):
        law, left = np.zeros(V), 1.0
        for child in children(tree, node):
            reach[child] = reach[node] * left * r[child]
            text_probability[child] = text_probability[node] * exact[node, tokens[child]]
            law[tokens[child]] += left * r[child]
            left *= 1 - r[child]
        np.testing.assert_allclose(reach[node], text_probability[node], atol=1e-6)
        if reach[node] < 1e-3:
            continue  # the script cannot lead here, or the law below it is a quotient of rounding errors
        if left > 2**-22:
            end = acceptance.path[node][acceptance.path[node] >= 0][-1]
            assert end == node
            np.testing.assert_allclose(residual[node].sum(), 1, atol=1e-6)
            law += left * residual[node]
        np.testing.assert_allclose(law, exact[node], atol=1e-6)

    kinds["cases"] += 1
    kinds["saturated"] += bool((r[tried] == 1).any())
    kinds["forbidden"] += bool((r[tried] == 0).any())
    kinds["duplicates"] += len(tried) < N - 1
    kinds["leaves"] += sum(not children(tree, node) for node in range(N))


couple = jax.jit(accept_coupled)


@settings(max_examples=1000)
@given(cases(), st.integers(0, 10**6))
def test_the_coupled_rule_gives_the_text_of_the_gumbel_max_trick(case, seed):
    """Whatever the tree, its text is the plain one, whose token after a text s is argmax(logits(s) + noise).

    The noise at each depth is independent of that at others and so of the tokens before, hence each token has the
    probability that Gumbel noise gives the largest sum: the integral over t = F(noise of x) of the product of
    F(noise + logit_x - logit_y) = t^(exp(logit_y - logit_x)), which is 1 / (1 + sum of those exponents).
    """
    tree, logits, exact = case
    tokens, parents, depths = tree
    count = 16
    noise = np.random.default_rng(seed).gumbel(size=(count, N, V)).astype(np.float32)
    rows = tree_of(*tree, rows=count)
    acceptance = jax.device_get(couple(rows, jnp.broadcast_to(jnp.asarray(logits), (count, N, V)), noise))
    for row in range(count):
        node, text, path = 0, [], [0]
        while True:
            text.append(int(np.argmax(logits[node] + noise[row, depths[node]])))
            matching = [c for c in range(1, N) if parents[c] == node and tokens[c] == text[-1]]
            if not matching:
                break
            # Of equal siblings the one that leads deepest is as good as any: follow the rule's own choice.
            node = next((c for c in matching if c in acceptance.path[row]), matching[0])
            path.append(node)
        assert acceptance.path[row].tolist() == path + [-1] * (N - len(path))
        assert (acceptance.length[row], acceptance.bonus[row]) == (len(path) - 1, text[-1])

    wide = logits.astype(np.float64)
    for node in range(N):
        with np.errstate(over="ignore", invalid="ignore"):
            exponents = np.exp(wide[node][None] - wide[node][:, None])  # of y, for x
            others = np.where(np.eye(V, dtype=bool), 0, exponents).sum(axis=1)
        winning = np.where(np.isfinite(wide[node]), 1 / (1 + others), 0)
        np.testing.assert_allclose(winning, exact[node], atol=1e-6)


def test_the_noise_is_gumbel_and_independent():
    """False alarm: 1e-3 for each of the tests."""
    from scipy import stats

    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        jax.random.split(jax.random.key(0), 4000), jnp.arange(2)
    )
    noise = np.asarray(choice_noise(keys, 3))
    assert noise.shape == (4000, 2, 3)
    for values in noise.reshape(4000, 6).T:
        assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
    correlation = stats.spearmanr(noise.reshape(4000, 6)).pvalue
    assert correlation[np.triu_indices(6, 1)].min() > 1e-3 / 15


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("sampling_*.npz")))
def test_scripted_uniforms_give_the_reference_s_outcomes(name):
    gold = np.load(GOLDEN / f"{name}.npz")
    ends = set()
    for prompt in ("p0", "p1"):
        tokens = gold[f"{prompt}/draft_tokens"].astype(np.int32)
        parents = np.concatenate([[-1], gold[f"{prompt}/mask_index"]]).astype(np.int32)
        tree = (tokens, parents, gold[f"{prompt}/tree_position_ids"].astype(np.int32))
        for c in range(len(gold["configs"])):
            config = {key: gold[f"{prompt}/cfg{c}/{key}"] for key in ("u", "accept_length", "end_node", "sample_p")}
            rows, consumed = config["u"].shape
            uniforms = np.full((rows, max(len(tokens) - 1, consumed)), ALMOST_1, np.float32)
            uniforms[:, :consumed] = config["u"]
            node_probs = gold[f"{prompt}/cfg{c}/node_probs"]
            probs = jnp.asarray(np.broadcast_to(node_probs, (rows, *node_probs.shape)))
            acceptance, residual = rule(tree_of(*tree, rows=rows), probs, uniforms[:, : len(tokens) - 1])
            np.testing.assert_array_equal(acceptance.length, config["accept_length"])
            end = np.take_along_axis(np.asarray(acceptance.path), np.asarray(acceptance.length)[:, None], axis=1)[:, 0]
            np.testing.assert_array_equal(end, config["end_node"])
            np.testing.assert_allclose(residual[: len(config["sample_p"])], config["sample_p"], atol=1e-6)
            ends |= set(end.tolist())
    assert len(ends) >= 8  # many different outcomes


def test_rows_do_not_share_uniforms_or_keys():
    rng = np.random.default_rng(0)
    tree = oracle.random_tree(rng, N, V, 3)
    logits = jnp.asarray(rng.normal(size=(1, N, V)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    together = jax.jit(accept_sampled)(tree_of(*tree, rows=64), jnp.broadcast_to(logits, (64, N, V)), keys)
    assert len(set(np.asarray(together.bonus).tolist())) > 1 and len(set(np.asarray(together.length).tolist())) > 1
    for row in (0, 17, 63):
        alone = accept_sampled(tree_of(*tree), logits, keys[row : row + 1])
        for field in ("path", "length", "bonus"):
            np.testing.assert_array_equal(getattr(alone, field)[0], getattr(together, field)[row])


def test_a_residual_of_nothing_falls_back_on_p():
    """Rounding: three children of 1/3 each, all rejected by the largest uniform."""
    tree = tree_of(*(np.array(x, np.int32) for x in ([0, 0, 1, 2], [-1, 0, 0, 0], [0, 1, 1, 1])))
    probs = jnp.full((1, 4, 3), np.float32(0.3333333))
    acceptance, residual = accept_sampling(tree, probs, jnp.full((1, 3), ALMOST_1))
    assert acceptance.length[0] == 1 or residual[0].sum() > 0.99


def test_without_keys_sampling_is_refused():
    with pytest.raises(ValueError, match="needs a key for each row"):
        accept_sampled(Tree.root(jnp.zeros(1, jnp.int32)), jnp.zeros((1, 1, V)), None)
