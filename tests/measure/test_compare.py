"""Decoding in turn, with a decoder that only counts: the order of calls, batches that are filled up, and sums."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

import eagle_jax
from eagle_jax import TreeConfig
from eagle_jax.measure import compare

TARGET = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
OPTIONS = dict(max_new_tokens=3, stop_tokens=())


def decoder(calls: list[str]):
    """Writes token 7 three times after each prompt: in two passes plain, in one with a draft."""

    def generate(target, draft, tokens, lengths, *, tree, capacity, **options):
        calls.append(draft or "plain")
        batch, cycles = len(lengths), 1 if draft else 2
        written = np.arange(tokens.shape[1])[None] - np.asarray(lengths)[:, None]
        new = (written >= 0) & (written < 3)
        return eagle_jax.Output(
            tokens=np.where(new, 7, tokens),
            lengths=np.asarray(lengths) + 3,
            cycles=np.full(batch, cycles),
            accepted=np.tile([0, 1] if draft else [2], (batch, 1)),
            failed=np.zeros(batch, bool),
            drafted=new & (written == 1) & bool(draft),
        )

    return generate


def test_methods_take_turns_and_the_last_batch_is_filled_with_the_first_prompts(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(compare, "generate", decoder(calls))
    seconds = iter(range(1, 100))
    monkeypatch.setattr(compare, "timed", lambda call: (next(seconds), call()))
    steps: list[int] = []
    methods = {"plain": (None, TreeConfig()), "drafted": ("draft", TreeConfig())}
    prompts = [[1], [2, 2], [3]]
    results, rows = compare.decode_in_turn(
        TARGET, methods, prompts, batch=2, repeats=3, progress=lambda: steps.append(1), **OPTIONS
    )
    assert rows == [[1], [2, 2], [3], [1]]
    assert calls == ["plain", "draft"] * 4 * 2 and len(steps) == len(calls)
    plain, drafted = results["plain"], results["drafted"]
    # Of three timed runs in turn the medians: 3 and 9 seconds plain, 4 and 10 drafted.
    assert (plain.seconds, drafted.seconds) == (12, 14)
    assert plain.tokens == drafted.tokens == [[7, 7, 7]] * 4
    assert (plain.cycles, plain.accepted, plain.steps) == (8, [8], 6)
    assert (drafted.cycles, drafted.accepted, drafted.steps) == (4, [0, 4], 4)
    assert drafted.drafted == [[False, True, False]] * 4
    assert drafted.accepted_at == [1.0] and drafted.tokens_a_pass == 2 and plain.rate == 1


def test_equal_texts_have_no_differences(monkeypatch):
    monkeypatch.setattr(compare, "generate", decoder([]))
    found = compare.compare(TARGET, "draft", [[1], [2]], tree=TreeConfig(), **OPTIONS)
    assert found.differences == [] and found.identical == 2 and found.prompt_lengths == [1, 1]
