"""Both heads equal the recorded tensors of the PyTorch reference, and refuse targets they were not made for."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.models.config import ConfigError, LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.ops.attention import attention
from tests import pickled
from tests.models.reference import SMALL, causal, fill, load_target

HEADS = ["t1_eagle3_dv96", "t1_eagle3_dv256", "t2_eagle1_bias", "t2_eagle1_nobias"]


def load_head(folder):
    kind = "eagle1" if "eagle1" in folder.name else "eagle3"
    config = DraftConfig.from_hf(json.loads((folder / "config.json").read_text()), kind=kind)
    tensors = pickled.read(folder / "pytorch_model.bin")
    if kind == "eagle1":
        # The file holds the target's embedding once more; its one layer is no list here.
        tensors = {name.replace("layers.0.", "layer."): tensor for name, tensor in tensors.items()}
        tensors.pop("embed_tokens.weight", None)
        return fill(lambda key: Eagle1Draft(config, key), tensors)
    offsets = tensors.pop("d2t")
    allowed = np.flatnonzero(tensors.pop("t2d"))
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    if config.draft_vocab_size != config.vocab_size:
        np.testing.assert_array_equal(allowed, np.arange(config.draft_vocab_size) + offsets)
        tensors["target_ids"] = allowed.astype(np.int32)
    return fill(lambda key: Eagle3Draft(config, 3, key), tensors)


@jax.jit
def head_pass(draft, target, features, tokens):
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))

    def attend(index, q, k, v):
        del index
        return attention(q, k, v, causal(batch, width)), (k, v)

    lengths = jnp.full(batch, width)
    hidden, kept = draft(target, draft.fuse(features), tokens, positions, attend, prompt_lengths=lengths)
    return hidden, draft.logits(target, hidden), kept


@pytest.mark.parametrize("name", HEADS)
def test_recorded_head_pass(golden, name):
    folder = golden / "weights" / f"{name[:2]}_target"
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    target = load_target(config, load_file(folder / "model.safetensors"))
    draft = load_head(golden / "weights" / name)
    draft.check_fits(target)
    recorded = np.load(golden / f"head_forward_{name}.npz")
    for prompt in range(3):
        expected = {key.split("/")[1]: recorded[key] for key in recorded.files if key.startswith(f"p{prompt}/")}
        features, tokens = jnp.asarray(expected["features"])[None], jnp.asarray(expected["token_ids"])[None]
        hidden, logits, [(k, v)] = head_pass(draft, target, features, tokens)
        np.testing.assert_allclose(hidden[0], expected["head_hidden"], atol=1e-4)
        np.testing.assert_allclose(logits[0], expected["draft_logits"], atol=1e-4)
        if prompt == 0:  # the one whose cache was recorded
            np.testing.assert_allclose(k[0], expected["cache_k"], atol=1e-4)
            np.testing.assert_allclose(v[0], expected["cache_v"], atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_the_recorded_weights_are_read_as_pytorch_reads_them(golden, name):
    """tests/pickled.py stands for PyTorch where that is not installed."""
    torch, path = pytest.importorskip("torch"), golden / "weights" / name / "pytorch_model.bin"
    ours, theirs = pickled.read(path), torch.load(path, weights_only=True)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor.numpy(), strict=True)


def abstract_pair(target_fields=None, num_taps=3, own_embedding=False, head=Eagle3Draft, **fields):
    """A target and a head, as shapes only."""
    target = LlamaConfig.from_hf(SMALL | (target_fields or {}))
    draft = DraftConfig.from_hf(SMALL | dict(num_hidden_layers=1) | fields, own_embedding=own_embedding)

    def build(key):
        args = (draft, num_taps, key) if head is Eagle3Draft else (draft, key)
        return Llama(target, key), head(*args)

    return jax.eval_shape(build, jax.random.key(0))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (dict(vocab_size=60), "vocab_size is 60 in the draft, 61 in the target"),
        (dict(hidden_size=64), "hidden_size is 64 in the draft, 32 in the target"),
        (
            dict(hidden_size=64, target_hidden_size=32),
            r"no embedding of its own\) is 64 in the draft, 32 in the target",
        ),
        (dict(own_embedding=True, target_hidden_size=48), "target_hidden_size is 48 in the draft, 32 in the target"),
        (dict(num_taps=2), "width of the features that fc reads is 64 in the draft, 96 in the target"),
        (dict(eagle_aux_hidden_state_layer_ids=[0, 1, 3]), "it taps layer 3, the target has 2 layers"),
        (dict(head=Eagle1Draft, vocab_size=60), "vocab_size is 60 in the draft, 61 in the target"),
        (dict(head=Eagle1Draft, hidden_size=64), "hidden_size is 64 in the draft, 32 in the target"),
    ],
)
def test_a_head_of_another_target_is_refused(pair, message):
    target, draft = abstract_pair(**pair)
    with pytest.raises(ConfigError, match=message):
        draft.check_fits(target)


def test_a_narrower_head_with_its_own_embedding_fits():
    target, draft = abstract_pair(hidden_size=16, target_hidden_size=32, own_embedding=True)
    draft.check_fits(target)
    assert draft.fc.shape == (16, 96)
    assert draft.embed.shape == (61, 16)


def test_head_taps():
    target, draft = abstract_pair(dict(num_hidden_layers=8))
    assert draft.taps(target) == (2, 4, 5)
    target, draft = abstract_pair(dict(num_hidden_layers=8), eagle_aux_hidden_state_layer_ids=[1, 2, 8])
    assert draft.taps(target) == (1, 2, 8)
    target, draft = abstract_pair(head=Eagle1Draft)
    assert draft.taps(target) == ()
