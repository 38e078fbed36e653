"""Medusa, lookahead and prompt lookup against plain Python: every guess of every cycle, and what each cycle brought."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Lookahead, Medusa, MedusaConfig, PromptLookup, StaticTree, TreeConfig
from eagle_jax.decode.cycle import step
from tests.drafts import oracle
from tests.toy import golden_pair, random_target, scaled

TEXTS, ROOM = 16, 64  # rows and columns of the oracle's passes
NEW = 40


@jax.jit
def best_two(target, tokens, lengths):
    """The two largest logits after every text, and their tokens."""
    logits, _ = eagle_jax.forward(target, tokens, lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jax.lax.top_k(last, 2)


def next_tokens_of(target):
    """The oracle's view of the target: greedy tokens after any texts, by plain passes over the whole of each."""

    def next_tokens(texts):
        said = []
        for start in range(0, len(texts), TEXTS):
            some = texts[start : start + TEXTS]
            tokens = np.zeros((TEXTS, ROOM), np.int32)
            lengths = np.ones(TEXTS, np.int32)
            for row, text in enumerate(some):
                tokens[row, : len(text)], lengths[row] = text, len(text)
            best, ids = best_two(target, jnp.asarray(tokens), jnp.asarray(lengths))
            # A near-tie might go the other way in a pass of another shape.
            assert (best[: len(some), 0] - best[: len(some), 1]).min() > 1e-4
            said += ids[: len(some), 0].tolist()
        return said

    return next_tokens


start = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=NEW + 20), static_argnames="tree")
run = jax.jit(step, static_argnames="tree")


def cycles_of(target, draft, prompt, tree=None):
    """The decoder's cycles: trees, and the tokens that each brought."""
    tokens, lengths = jnp.array([prompt]), jnp.array([len(prompt)])
    tree = TreeConfig() if tree is None else tree
    state = start(target, draft, tokens, lengths, tree=tree)
    while int(state.lengths[0]) < len(prompt) + 1 + NEW:
        before = int(state.lengths[0])
        done = run(target, draft, state, tree=tree)
        state = done.state
        yield jax.device_get(done.tree), np.asarray(state.tokens[0, before : int(state.lengths[0])]).tolist()


def chains_of(tree, count: int, length: int) -> list[list[int]]:
    """The chains that `merge_chains` put first into a tree: the first `count` of `length` tokens that are guesses."""
    tokens = tree.tokens[0, 1 : 1 + count * length].reshape(count, length)
    there = tree.scores[0, 1 : 1 + count * length].reshape(count, length) == 0
    return [row.tolist() for row, flags in zip(tokens, there, strict=True) if flags.all()]


def compare(ours, theirs, guesses_of):
    """Runs both to the end; returns all gains."""
    gains = []
    for (tree, gained), expected in zip(ours, theirs, strict=True):
        assert guesses_of(tree) == expected.guesses
        assert gained == expected.gained
        gains.append(len(gained))
    assert sum(gains) >= NEW and len(gains) >= 5
    return gains


def prompt_of(seed: int, length: int, vocab: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


@pytest.mark.parametrize(
    "draft",
    [
        Lookahead(window=4, ngram=3, guesses=3, remembered=3),
        Lookahead(window=3, ngram=4, guesses=2, remembered=64),
        Lookahead(window=5, ngram=2, guesses=4, remembered=8),
    ],
    ids=str,
)
def test_lookahead(draft):
    found, gains = 0, []
    for seed in range(3):
        target, prompt = random_target(seed, 6.0), prompt_of(seed, 7, 97)
        sizes = dict(window=draft.window, ngram=draft.ngram, guesses=draft.guesses, remembered=draft.remembered)
        theirs = list(oracle.lookahead(prompt, next_tokens_of(target), new=NEW, **sizes))
        guesses_of = functools.partial(chains_of, count=draft.guesses, length=draft.ngram - 1)
        gains += compare(cycles_of(target, draft, prompt), theirs, guesses_of)
        found += sum(map(len, [cycle.guesses for cycle in theirs]))
    assert found > 10 and max(gains) > 1, "the pool was never of use"


@pytest.mark.parametrize(
    "draft", [PromptLookup(length=4), PromptLookup(length=3, branches=3, ngram=2), PromptLookup(2, 2, 1)], ids=str
)
def test_prompt_lookup(draft):
    found, gains = 0, []
    for seed in range(3):
        target, prompt = random_target(seed), [*prompt_of(seed, 6, 5), *prompt_of(seed, 6, 5)]
        theirs = list(
            oracle.prompt_lookup(prompt, next_tokens_of(target), draft.length, draft.branches, draft.ngram, NEW)
        )
        guesses_of = functools.partial(chains_of, count=draft.branches, length=draft.length)
        gains += compare(cycles_of(target, draft, prompt), theirs, guesses_of)
        found += sum(map(len, [cycle.guesses for cycle in theirs]))
    assert found > 10 and max(gains) > 1


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_medusa(num_blocks):
    """The heads in NumPy, from the weights and the target's own hidden state."""
    target, _ = golden_pair()
    config = MedusaConfig(target.config.vocab_size, target.config.hidden_size, num_heads=3, num_blocks=num_blocks)
    draft = scaled(Medusa(config, jax.random.key(1)), 6.0)
    # Heads that guess well, so that something is accepted: the target's own lm_head under a small disturbance.
    for number, head in enumerate(draft.heads):
        head.lm_head = head.lm_head * 0.02 * (number + 1) + (target.embed if target.lm_head is None else target.lm_head)
    paths = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 1), (0, 0, 0), (0, 1, 0), (2, 1, 3)]

    @jax.jit
    def hidden_of(tokens, length):
        positions = jnp.arange(ROOM)[None]
        mask = jnp.tri(ROOM, dtype=bool)[None]
        out = target(tokens, positions, mask, prompt_lengths=length[None])
        return out.hidden[0, length - 1]

    def heads(text):
        tokens = np.zeros((1, ROOM), np.int32)
        tokens[0, : len(text)] = text
        hidden = np.asarray(hidden_of(jnp.asarray(tokens), jnp.int32(len(text))), np.float64)
        logits = []
        for head in draft.heads:
            x = hidden
            for block in head.blocks:
                pre = np.asarray(block.weight[...], np.float64) @ x + np.asarray(block.bias[...], np.float64)
                x = x + pre / (1 + np.exp(-pre))
            logits.append(np.asarray(head.lm_head, np.float64) @ x)
        return np.stack(logits)

    tree, gains = StaticTree(paths), []
    for seed in range(2):
        prompt = prompt_of(seed, 20, 120)
        theirs = list(oracle.medusa(prompt, next_tokens_of(target), heads, paths, NEW))

        def guesses_of(tree):  # every node's text
            tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
            texts = [[]]
            for token, parent in zip(tokens[1:], parents[1:], strict=True):
                texts.append([*texts[parent], token])
            return texts[1:]

        gains += compare(cycles_of(target, draft, prompt, tree), theirs, guesses_of)
    assert max(gains) > 1, "no head was ever right"
