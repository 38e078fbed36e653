"""The drafted tokens that are the target's, and the command that decides by them which layers a head reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Eagle3Draft, Llama, TreeConfig, forward, generate, propose
from eagle_jax.cli import check_taps, main
from eagle_jax.convert import CheckpointError, HeadChoices, load
from eagle_jax.convert.heads.candidates import candidates
from eagle_jax.measure.drafted_tokens import Share, best_of, drafted_matches, drafted_tokens
from eagle_jax.measure.samples import CODE_TEXTS
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG
from tests.convert.reading import MAY_BE_EITHER, SPECULATORS, in_memory
from tests.drafts.kinds import KINDS
from tests.drafts.test_lossless import CONFIG as FEW_TOKENS
from tests.drafts.test_lossless import target_of
from tests.toy import random_eagle3, random_prompts, random_target

PAIR = Path(eagle_jax.__file__).parent / "pair"
TAPS = "eagle_aux_hidden_state_layer_ids"


def test_counts_are_those_of_first_trees():
    """At every position: the likeliest draft after that prefix, against the token with which the target went on."""
    target, draft = random_target(0), random_eagle3(1)
    prompts, lengths = random_prompts(2, batch=2, width=6)
    out = generate(target, None, prompts, lengths, max_new_tokens=7)
    tokens, ends = np.asarray(out.tokens), np.asarray(out.lengths) - 1
    accepted = positions = 0
    for row in range(2):
        for end in range(int(lengths[row]), ends[row]):
            # The tree's root follows the prompt of `end` tokens.
            prefix = jnp.zeros((1, 12), jnp.int32).at[0, :end].set(tokens[row, :end])
            tree = propose(target, draft, prefix, jnp.array([end]), tree=TreeConfig(depth=1, top_k=1, num_nodes=2))
            assert int(tree.tokens[0, 0]) == tokens[row, end]
            accepted += int(tree.tokens[0, 1]) == tokens[row, end + 1]
            positions += 1
    first, second = drafted_tokens(target, draft, out.tokens, lengths, jnp.asarray(ends))
    assert first == Share(accepted, positions) and positions == 12
    assert second.positions == 10


def test_second_tokens_are_those_of_chains():
    """Wherever the first drafted token is the text's, the chain's second one is the one that is counted."""
    target, draft = target_of(0), KINDS["eagle3.1"].build(FEW_TOKENS, 1, 12.0)
    prompts, lengths = random_prompts(2, batch=4, width=6, vocab=FEW_TOKENS.vocab_size)
    out = generate(target, None, prompts, lengths, max_new_tokens=20)
    first, second = (np.asarray(found) for found in drafted_matches(target, draft, out.tokens, out.lengths))
    tokens, logits = np.asarray(out.tokens), np.asarray(forward(target, out.tokens, out.lengths)[0])
    inside = [(row, end) for row in range(4) for end in range(int(lengths[row]), int(out.lengths[row]) - 2)]
    places = [(row, end) for row, end in inside if first[row, end - 1]]
    prefixes = jnp.stack([jnp.where(jnp.arange(26) < end, out.tokens[row], 0) for row, end in places])
    ends = jnp.array([end for _, end in places])
    chains = propose(target, draft, prefixes, ends, tree=TreeConfig(depth=2, top_k=1, num_nodes=3)).tokens
    for (row, end), chain in zip(places, np.asarray(chains), strict=True):
        assert chain[:2].tolist() == tokens[row, end : end + 2].tolist()
        assert second[row, end - 1] == (chain[2] == logits[row, end + 1].argmax())
    right = sum(second[row, end - 1] for row, end in places)
    assert len(places) >= 8 and 0 < right < len(places)


def test_two_standard_errors():
    many, few = Share(80, 100), Share(60, 100)
    assert many.beats(few) and not few.beats(many) and not many.beats(Share(75, 100))
    assert Share(0, 0).rate == 0 and not Share(0, 0).beats(Share(0, 0))


def test_the_second_token_decides_where_the_first_does_not():
    low, high = Share(10, 100), Share(80, 100)
    assert best_of([(low, high), (high, low)]) == 1
    assert best_of([(high, low), (low, high), (high, high)]) == 2
    assert best_of([(high, low), (high, low)]) is None and best_of([(high, high), (high, low), (high, high)]) is None


def listed(fields: dict[str, Any], choices: HeadChoices | None = None) -> list[tuple[Any, Any]]:
    checkpoint = in_memory(HEAD_CONFIG | fields, folders.eagle3_arrays())
    found = candidates(checkpoint, choices or HeadChoices(), num_layers=8)
    return [(one.choices.taps, one.choices.norm_before_residual) for one in found]


def test_the_readings_that_are_measured():
    assert listed(MAY_BE_EITHER) == [((2, 4, 6), None), ((3, 5, 7), None)]
    assert listed({}) == [((2, 4, 5), None), ((1, 3, 4), None), ((3, 5, 6), None)]
    assert listed({"eagle_config": {TAPS: [0, 4, 8]}}) == [((0, 4, 8), None)]  # there is no layer 9
    open_residual = {name: value for name, value in SPECULATORS.items() if name != "norm_before_residual"}
    assert listed(open_residual | {TAPS: [8]}) == [((8,), False), ((8,), True)]
    checkpoint = in_memory(HEAD_CONFIG | MAY_BE_EITHER | {"norm_output": True}, folders.eagle3_arrays())
    found = candidates(checkpoint, HeadChoices(), num_layers=8)
    assert [one.choices.norm_output for one in found] == [False, True] * 2
    assert found[1].words.endswith("names inputs, norm_output = true")
    found = candidates(checkpoint, HeadChoices(taps=(1, 2, 3)), num_layers=8)
    assert [(one.choices.taps, one.choices.norm_output) for one in found] == [((1, 2, 3), False), ((1, 2, 3), True)]
    with pytest.raises(CheckpointError, match="--taps lists the layers"):
        listed({}, HeadChoices(taps=(1, 2, 3)))


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    target = folders.write_safetensors(tmp_path / "target", CONFIG | {"num_hidden_layers": 8}, folders.llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", HEAD_CONFIG | MAY_BE_EITHER, folders.eagle3_arrays())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tokens": [1, 2, 3]}\n{"tokens": [4]}\n')
    return ["--target", str(target), "--draft", str(head), "--check-taps", "--prompts", str(prompts)]


def test_the_command(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """Which reading wins is scripted: the outputs', then neither."""
    second = Share(5, 90)
    shares = {(2, 4, 6): Share(10, 100), (3, 5, 7): Share(80, 100)}
    seen: list[tuple[type, type, list[int]]] = []

    def counted(target, draft, tokens, prompt_lengths, lengths):
        seen.append((type(target), type(draft), lengths.tolist()))
        return shares[draft.config.taps], second

    def written(target, draft, tokens, lengths, max_new_tokens):
        assert draft is None and tokens.tolist() == [[1, 2, 3], [4, 0, 0]] and max_new_tokens == 64
        return SimpleNamespace(tokens=tokens, lengths=lengths + 2)

    monkeypatch.setattr(check_taps, "drafted_tokens", counted)
    monkeypatch.setattr(check_taps, "generate", written)
    assert main(["convert", *tiny]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(rate in printed for rate in ("10.0%", "80.0%", "5.6%")) and "names outputs (--taps 3,5,7)" in printed
    assert seen == [(Llama, Eagle3Draft, [5, 3])] * 2
    assert main(["convert", *tiny, "--out", str(tmp_path / "out")]) == 0
    assert "the inputs of layers 3, 5, 7 are read; as chosen" in capsys.readouterr().out
    assert load(tmp_path / "out")[1].config.taps == (3, 5, 7)
    shares[(2, 4, 6)] = Share(79, 100)
    assert main(["convert", *tiny, "--out", str(tmp_path / "none")]) == 1
    assert "does not tell" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_options_that_do_not_go_together(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["convert", "--target", tiny[1], "--check-taps"]) == 2
    assert "name it with --draft" in capsys.readouterr().err
    assert main(["convert", "--target", tiny[1]]) == 2 and "--out names the folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_head_reads_its_own_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its ids, written as outputs at a place where readers take them for inputs, and a norm_output that is none."""
    head = Path(shutil.copytree(PAIR / "head", tmp_path / "head"))
    config = json.loads((head / "config.json").read_text())
    stated = {TAPS: [1, 5, 8], "norm_output": True, "architectures": ["LlamaForCausalLMEagle3"]}
    (head / "config.json").write_text(json.dumps(config | stated))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in CODE_TEXTS))
    options = ["--target", str(PAIR / "target"), "--draft", str(head), "--dtype", "float32"]
    assert main(["convert", *options, "--check-taps", "--prompts", str(prompts)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "names outputs, norm_output = false (--taps 2,6,9)" in printed
