"""A DSpark head equals a transcription of its published description in NumPy, along every path of a tree."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from eagle_jax import ConfigError, Context, Llama, LlamaConfig, StaticTree, TreeConfig, convert, generate, load_draft
from eagle_jax.convert import to_official
from eagle_jax.drafts.dspark import DSpark, DSparkConfig, with_confidence
from eagle_jax.models import params
from tests.drafts.kinds import KINDS, dspark
from tests.drafts.test_dflash import hidden_by_hand, remember
from tests.drafts.test_lossless import CONFIG, target_of
from tests.tree.oracle import log_softmax

SHAPE = StaticTree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step_by_hand(w, kind, state, token, hidden):
    """-> the bias of the next token's logits, and the state."""
    before = w["markov.embed"][token]
    if kind == "vanilla":
        return w["markov.lm_head"] @ before, state
    if kind == "gated":
        gate = sigmoid(w["markov.gate"] @ np.concatenate([hidden, before]) + w["markov.gate_bias"])
        return w["markov.lm_head"] @ (gate * before), state
    mixed = w["markov.joint"] @ np.concatenate([state, before, hidden]) + w["markov.joint_bias"]
    gate, candidate, output = np.split(mixed, 3)
    state = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(candidate)
    return w["markov.lm_head"] @ np.tanh(output), state


@functools.partial(jax.jit, static_argnames="tree")
def propose(target, draft, tokens, lengths, tree):
    taps, root, memory = remember(target, draft, tokens, lengths)
    context = Context(tokens, lengths, lengths, root, lengths - 1, memory, None, None, None)
    return taps, root, draft.propose(target, context, tree).tree


def renumbered(draft):
    """Its draft ids are every other target id, and more from the top."""
    size, some = draft.config.vocab_size, draft.config.draft_vocab_size
    ids = np.sort(np.concatenate([np.arange(0, size, 2), np.arange(size - 1, 0, -2)])[:some])
    draft.target_ids.set_value(jnp.asarray(ids, jnp.int32))
    return draft


def arrays(draft):
    return {path: np.asarray(array, np.float64) for path, array in params.flatten(draft).items()}


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_equals_numpy(kind):
    target = target_of(0)
    draft = renumbered(dspark(CONFIG, 1, 6.0, markov_type=kind, confidence_threshold=0.0))
    w, config = arrays(draft), draft.config
    tokens = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    taps, root, tree = propose(target, draft, tokens, np.array([8, 5], np.int32), SHAPE)
    correction = 0.0
    for row, length in enumerate((8, 5)):
        block = np.array([int(root[row]), *[config.mask_token_id] * (SHAPE.depth - 1)])
        before = np.asarray(taps, np.float64)[row, : length - 1]
        hidden = hidden_by_hand(draft, target, before, block, length - 1)
        nodes = {(): (np.zeros(config.markov_rank), int(root[row]), 0.0)}  # path of ranks -> state, token, score
        for node, path in enumerate(SHAPE.paths, start=1):
            state, token, score = nodes[path[:-1]]
            plain = w["lm_head"] @ hidden[len(path) - 1]
            bias, state = step_by_hand(w, kind, state, token, hidden[len(path) - 1])
            log_probs = log_softmax(plain + bias)
            of_rank = int(np.argsort(-log_probs, kind="stable")[path[-1]])
            chosen = int(w["target_ids"][of_rank])
            nodes[path] = state, chosen, score + log_probs[of_rank]
            assert int(tree.tokens[row, node]) == chosen
            np.testing.assert_allclose(tree.scores[row, node], nodes[path][2], rtol=1e-3, atol=1e-3)
            correction = max(correction, abs(log_softmax(plain)[of_rank] - log_probs[of_rank]))
    assert correction > 0.01, "the Markov head changes nothing"


def test_an_unconfident_node_has_no_children():
    """Their scores are -inf, and a dynamic tree has them only where it has nothing else."""
    tokens, lengths = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (2, 8)).astype(np.int32), np.array([8, 5])
    target, draft = target_of(0), KINDS["dspark"].build(CONFIG, 1, 6.0)
    w, config = arrays(draft), draft.config
    shape = TreeConfig(depth=3, top_k=2, num_nodes=11)
    draft = with_confidence(draft, 0.5)
    taps, root, tree = propose(target, draft, tokens, lengths.astype(np.int32), shape)
    found = set()
    for row, length in enumerate(lengths):
        block = np.array([int(root[row]), *[config.mask_token_id] * (shape.depth - 1)])
        before = np.asarray(taps, np.float64)[row, : length - 1]
        hidden = hidden_by_hand(draft, target, before, block, length - 1)
        for node in range(1, shape.num_nodes):
            parent, depth = int(tree.parents[row, node]), int(tree.depths[row, node]) - 1
            if not np.isfinite(tree.scores[row, parent]):
                continue
            read = np.concatenate([hidden[depth], w["markov.embed"][int(tree.tokens[row, parent])]])
            sure = sigmoid(w["confidence"][0] @ read + w["confidence_bias"][0]) >= 0.5
            assert np.isfinite(tree.scores[row, node]) == sure
            found.add(bool(sure))
    assert found == {False, True}


def test_a_confidence_threshold_is_a_probability_of_a_head_that_has_one():
    draft = KINDS["dspark"].build(CONFIG, 1, 6.0)
    assert with_confidence(draft, 0).config.confidence_threshold == 0 < draft.config.confidence_threshold
    with pytest.raises(ConfigError, match=r"a probability, 0 to 1, got 1\.5"):
        with_confidence(draft, 1.5)
    with pytest.raises(ConfigError, match="this DSpark head has no confidence head"):
        with_confidence(dspark(CONFIG, 1, 6.0, confidence=False, confidence_with_markov=False), 0.5)


def test_a_block_drafts_as_many_tokens_as_it_has():
    target, draft = target_of(0), KINDS["dspark"].build(CONFIG, 1, 6.0)  # of five
    prompt = jnp.array([[3, 4, 5]], jnp.int32), jnp.array([3], jnp.int32)
    assert generate(target, draft, *prompt, tree=StaticTree.chain(5), max_new_tokens=2).lengths[0] == 5
    with pytest.raises(ValueError, match=r"depth 6 needs a block of 6.*trained on blocks of 5.*depth 5 or less"):
        generate(target, draft, *prompt, tree=StaticTree.chain(6), max_new_tokens=2)


PUBLISHED = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "layer_types": ["full_attention"] * 2,
    "tie_word_embeddings": False,
    "block_size": 7,
    "num_target_layers": 3,
    "num_anchors": 512,
    "mask_token_id": 63,
    "target_layer_ids": [0, 1],
    "markov_rank": 4,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}


def test_a_folder_is_converted_and_loaded(tmp_path):
    """As its authors write it, with copies of the target's embedding and lm_head in the file, or without."""
    sizes = PUBLISHED | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    target = Llama(LlamaConfig.from_hf(sizes | {"model_type": "llama"}), jax.random.key(0))
    for name, own in (("with", True), ("without", False)):
        config = DSparkConfig.from_hf(PUBLISHED, own_embedding=own, own_lm_head=own)
        assert (config.deepest, config.taps, config.markov_rank, config.confidence) == (7, (1, 2), 4, True)
        head = DSpark(config, jax.random.key(1))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(PUBLISHED))
        save_file(to_official(head), folder / "model.safetensors")
        (tmp_path / "target").mkdir(exist_ok=True)
        (tmp_path / "target" / "config.json").write_text(json.dumps(sizes | {"model_type": "llama"}))
        save_file(to_official(target), tmp_path / "target" / "model.safetensors")
        out = convert.convert(tmp_path / "target", folder, tmp_path / f"{name} out")
        for draft in (load_draft(folder, target), convert.load(out)[1]):
            assert type(draft) is DSpark and draft.config == config
            assert {path: array.tobytes() for path, array in arrays(draft).items()} == {
                path: array.tobytes() for path, array in arrays(head).items()
            }


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (PUBLISHED | {"markov_rank": None}, "markov_rank must be an integer, 0 without a Markov head, got None"),
        (PUBLISHED | {"markov_head_type": "gru"}, "markov_head_type = 'gru' is not implemented"),
        (PUBLISHED | {"markov_rank": 0}, "confidence_head_with_markov = True, but markov_rank is 0"),
        (PUBLISHED | {"dflash_config": {"markov_rank": 8}}, "markov_rank = 4 and dflash_config.markov_rank = 8"),
        (PUBLISHED | {"dflash_config": {"novelty": 3}}, "dflash_config.novelty is not known"),
        (PUBLISHED | {"target_layer_ids": None}, "target_layer_ids is missing"),
        (PUBLISHED | {"mask_token_id": 64}, "mask_token_id must be a token id, got 64"),
        (PUBLISHED | {"model_type": "gemma4"}, "model_type = 'gemma4' is not implemented"),
    ],
)
def test_configs_that_cannot_be_read(hf, message):
    with pytest.raises(ConfigError, match=message):
        DSparkConfig.from_hf(hf)
