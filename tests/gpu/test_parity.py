"""The models equal PyTorch on the device: recorded tensors of the reference, transformers beside us, a training loss.

float32 means float32: neither side may use TF32.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import eagle_jax
from eagle_jax.convert import to_official
from eagle_jax.train import eagle3_loss
from tests.gpu.devices import DEVICES
from tests.toy import GOLDEN, golden_pair

PAIR = Path(eagle_jax.__file__).parent / "pair"
TOLERANCE = 1e-4  # of float32 logits and hidden states, whose largest values are between 1 and 20
TARGETS = {"t1": "t1_eagle3_dv96", "t2": "t2_eagle1_bias"}  # and a head, whose features are asked for
HEADS = ["t1_eagle3_dv96", "t1_eagle3_dv256", "t2_eagle1_bias", "t2_eagle1_nobias"]

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("name", TARGETS)
def test_target_equals_the_recorded_tensors(device, name):
    target, draft = golden_pair(TARGETS[name], f"{name}_target")
    recorded = np.load(GOLDEN / f"target_forward_{name}.npz")
    for prompt in range(3):
        logits, features = eagle_jax.forward(target, *eagle_jax.pad([recorded[f"p{prompt}/input_ids"]]), draft=draft)
        length = len(recorded[f"p{prompt}/input_ids"])
        np.testing.assert_allclose(logits[0, :length], recorded[f"p{prompt}/logits"], atol=TOLERANCE)
        if name == "t1":
            expected = np.concatenate([recorded[f"p{prompt}/tap{index}"] for index in range(3)], axis=-1)
        else:
            expected = recorded[f"p{prompt}/final_hidden"]
        np.testing.assert_allclose(features[0, :length], expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", HEADS)
def test_heads_equal_the_recorded_tensors(device, name):
    target, draft = golden_pair(name, name[:2] + "_target")
    recorded = np.load(GOLDEN / f"head_forward_{name}.npz")
    for prompt in range(3):
        ids, features = recorded[f"p{prompt}/token_ids"], recorded[f"p{prompt}/features"]
        hidden, logits = eagle_jax.draft_forward(
            draft, target, jnp.asarray(features)[None], jnp.asarray(ids)[None], jnp.array([len(ids)])
        )
        np.testing.assert_allclose(hidden[0], recorded[f"p{prompt}/head_hidden"], atol=TOLERANCE)
        np.testing.assert_allclose(logits[0], recorded[f"p{prompt}/draft_logits"], atol=TOLERANCE)


@pytest.mark.parametrize("folder", [GOLDEN / "weights" / "t1_target", PAIR / "target"], ids=["t1", "embedded"])
def test_target_equals_transformers(device, folder):
    """float32 within TOLERANCE. bfloat16: as near to float32 as transformers' own bfloat16 is, give or take a half."""
    torch.backends.cuda.matmul.allow_tf32 = False
    vocab = transformers.LlamaConfig.from_pretrained(folder).vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (3, 64))
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens).to(device)).logits.float().cpu().numpy()
        target, _ = eagle_jax.from_pretrained(folder, dtype=dtype)
        ours, _ = eagle_jax.forward(target, jnp.asarray(tokens, jnp.int32), jnp.full(3, 64))
        logits[dtype] = np.asarray(ours), theirs
    ours, theirs = logits["float32"]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    # The root mean square over 192 positions: rounding is chance at one of them.
    our_error, their_error = (np.sqrt(np.mean((half - theirs) ** 2)) for half in logits["bfloat16"])
    assert 1e-3 < our_error < 1.5 * their_error


@pytest.mark.parametrize("head", ["dv96", "dv256"])
def test_training_loss_and_gradient_equal_the_recorded_ones(device, head):
    gold = np.load(GOLDEN / f"train_eagle3_{head}.npz")
    target, draft = golden_pair(f"t1_eagle3_{head}")
    tokens, mask = (jnp.asarray(gold[f"trained/{name}"], jnp.int32) for name in ("input_ids", "loss_mask"))
    lengths = jnp.asarray(gold["trained/attention_mask"].sum(axis=1), jnp.int32)

    def total(draft, target):
        losses, accuracies = eagle3_loss(draft, target, tokens, lengths, mask, 7, "official")
        return (losses * 0.8 ** jnp.arange(7)).sum(), (losses, accuracies)

    gradient_of = jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))
    (whole, (losses, accuracies)), gradient = gradient_of(draft, target)
    np.testing.assert_allclose(losses, gold["trained/plosses"], rtol=TOLERANCE)
    np.testing.assert_allclose(whole, gold["trained/loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(accuracies, gold["trained/acces"], atol=1e-6)
    ours = to_official(gradient)
    recorded = [key for key in gold.files if key.startswith("trained/grad/")]
    assert len(recorded) >= 6
    for key in recorded:
        theirs = gold[key]
        assert np.abs(ours[key.removeprefix("trained/grad/")] - theirs).max() <= 1e-3 * np.abs(theirs).max(), key
