"""A P-EAGLE head equals a transcription of its description: one causal pass over the text's pairs and mask rows."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from eagle_jax import (
    BestPrefixes,
    Committed,
    ConfigError,
    Llama,
    LlamaConfig,
    PEagle,
    PEagleConfig,
    StaticTree,
    TargetOutput,
    generate,
    load,
    load_draft,
)
from eagle_jax.cli import main
from eagle_jax.convert import to_official
from eagle_jax.models import params
from tests.drafts.kinds import KINDS
from tests.drafts.test_head_parts import by_hand
from tests.drafts.test_lossless import CONFIG, target_of


@jax.jit
def run(target, draft, tokens, lengths):
    """Commits 7 and 4 positions; the second sequence gains nothing in the second commit. -> taps, hidden states."""
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    mask = jnp.broadcast_to(jnp.tri(8, dtype=bool), (2, 8, 8))
    output = target(tokens, positions, mask, prompt_lengths=lengths, taps=draft.taps(target))
    memory = draft.start(target, 2, 128)
    following = jnp.roll(tokens, -1, axis=1)
    for start, count in ((0, (4, 4)), (4, (3, 0))):
        new = slice(start, start + 4)
        taken = TargetOutput(output.hidden[:, new], output.taps[:, new])
        counts = jnp.full(2, start, jnp.int32), jnp.array(count, jnp.int32)
        memory = draft.update(target, memory, Committed(tokens[:, new], following[:, new], *counts, taken, lengths))
    return output.taps, memory.hidden, draft.logits(target, memory.hidden)


def test_equals_numpy():
    target, draft = target_of(0), KINDS["p-eagle"].build(CONFIG, 1, 6.0)
    tokens = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    features, hidden, logits = run(target, draft, tokens, np.array([8, 5], np.int32))
    for row, length in enumerate((8, 5)):
        masks = draft.config.num_depths - 1
        unknown = np.broadcast_to(np.asarray(draft.mask_hidden[...])[0], (masks, features.shape[-1]))
        pairs = np.concatenate([np.asarray(features)[row, : length - 1], unknown]).astype(np.float64)
        theirs = by_hand(draft, target, pairs, np.array([*tokens[row, 1:length], *[1] * masks]))
        for ours, expected in zip((hidden, logits), theirs, strict=True):
            np.testing.assert_allclose(ours[row], expected[length - 2 :], atol=2e-4 * np.abs(expected).max())
    assert np.abs(logits).max() > 1


def test_a_tree_deeper_than_a_pass_is_refused():
    target, draft = target_of(0), KINDS["p-eagle"].build(CONFIG, 1, 6.0)
    prompt = jnp.array([[3, 4, 5]], jnp.int32), jnp.array([3], jnp.int32)
    with pytest.raises(ValueError, match=r"depth 5 is deeper than the 4 tokens.*depth 4 or less"):
        generate(target, draft, *prompt, tree=StaticTree.chain(5), max_new_tokens=2)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-5,
}
SPECULATORS = {
    "speculators_model_type": "peagle",
    "transformer_layer_config": SIZES,
    "draft_vocab_size": 32,
    "norm_before_residual": False,
    "mask_token_id": 9,
    "num_depths": 8,
}
STATED = {"proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 8}]}  # the depths of the training
VLLM = SIZES | {"parallel_drafting": True, "ptd_token_id": 9, "num_depths": 8}


@pytest.mark.parametrize(
    "hf",
    [
        SPECULATORS,
        SPECULATORS | {"num_depths": None, "speculators_config": STATED},
        VLLM,
        VLLM | {"ptd_token_id": None, "pard_token": 9},
    ],
)
def test_published_configs(hf):
    config = PEagleConfig.from_hf(hf, own_lm_head=True)
    assert (config.num_layers, config.mask_token_id, config.num_depths) == (4, 9, 8)
    assert config.draft_vocab_size == hf.get("draft_vocab_size", 64)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (VLLM | {"ptd_token_id": None}, "mask_token_id .* must be a token id below 64, got None"),
        (VLLM | {"ptd_token_id": 64}, "must be a token id below 64, got 64"),
        (VLLM | {"mask_token_id": 8}, "ptd_token_id = 9 and mask_token_id = 8 contradict each other"),
        (VLLM | {"num_depths": None}, "num_depths is missing"),
        (SPECULATORS | {"num_depths": 4, "speculators_config": STATED}, "num_depths = 4 and proposal_methods.*= 8"),
        (VLLM | {"parallel_drafting": False}, "parallel_drafting = False, but the head has a tensor mask_hidden"),
        (SPECULATORS | {"speculators_model_type": "eagle3"}, "'eagle3', but a tensor mask_hidden.* is present"),
    ],
)
def test_configs_that_cannot_be_read(hf, message):
    with pytest.raises(ConfigError, match=message):
        PEagleConfig.from_hf(hf)


def test_fewer_depths_draft_the_same_first_tokens():
    target, draft = target_of(0), KINDS["p-eagle"].build(CONFIG, 1, 6.0)
    tokens = np.random.default_rng(1).integers(2, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    many, lengths = run(target, draft, tokens, np.array([8, 5], np.int32))[1], np.array([8, 5], np.int32)
    draft.config = dataclasses.replace(draft.config, num_depths=2)
    np.testing.assert_allclose(run(target, draft, tokens, lengths)[1], many[:, :2], rtol=1e-4, atol=1e-5)


def test_a_folder_is_converted_and_loaded(tmp_path):
    """By the command, and by load_draft, from a folder as speculators writes it: the same weights, a lossless text."""
    sizes = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 4}
    target = Llama(LlamaConfig.from_hf(sizes), jax.random.key(0))
    head = PEagle(PEagleConfig.from_hf({**SPECULATORS, "transformer_layer_config": sizes}), 3, jax.random.key(1))
    head.target_ids.set_value(jnp.arange(1, 64, 2, dtype=jnp.int32))
    for name, model, config in (
        ("target", target, sizes | {"model_type": "llama"}),
        ("head", head, {**SPECULATORS, "transformer_layer_config": sizes | {"model_type": "llama"}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(to_official(model), tmp_path / name / "model.safetensors")
    folders = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "head"), "--out", str(tmp_path / "out")]
    assert main(["convert", *folders]) == 0
    loaded = load(tmp_path / "out")[1], load_draft(tmp_path / "head", target)
    prompt = jnp.array([[3, 4, 5, 6]], jnp.int32), jnp.array([4], jnp.int32)
    plain = generate(target, None, *prompt, max_new_tokens=8)
    for draft in loaded:
        assert type(draft) is PEagle and draft.config.num_depths == 8 and draft.config.mask_token_id == 9
        for path, array in params.flatten(head).items():
            np.testing.assert_array_equal(params.flatten(draft)[path], array, path)
        ours = generate(target, draft, *prompt, tree=BestPrefixes(8, 12), max_new_tokens=8)
        np.testing.assert_array_equal(ours.tokens, plain.tokens)
