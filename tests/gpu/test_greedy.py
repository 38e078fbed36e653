"""Greedy speculative decoding gives the text of plain decoding on the device, in float32 and in bfloat16.

A pass of one token and a pass of many round differently, so that texts may part where two logits nearly tie. Every
parting is shown to be such a place, by the target's own logits in float32.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import eagle_jax
from eagle_jax import TreeConfig
from eagle_jax.measure.near_tie import ABSOLUTE_MARGIN, differences, near_tie_absolute
from eagle_jax.measure.samples import CODE_TEXTS
from tests.gpu.devices import DEVICES
from tests.toy import GOLDEN, golden_pair, near_ties, rows_of

PAIR = Path(eagle_jax.__file__).parent / "pair"
on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
def test_float32_text_is_the_reference_s_and_plain_decoding_s(device):
    gold = np.load(GOLDEN / "gen_t1_eagle3_dv96_60_7_10.npz")
    target, draft = golden_pair("t1_eagle3_dv96")
    prompts = [gold[f"p{p}/input_ids"] for p in range(3)]
    tokens, lengths = eagle_jax.pad(prompts)
    plain = rows_of(eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=128))
    ours = rows_of(eagle_jax.generate(target, draft, tokens, lengths, tree=TreeConfig(), max_new_tokens=128))
    recorded = [gold[f"p{p}/naive_output_ids"][: len(prompts[p]) + 128].tolist() for p in range(3)]
    for texts in (plain, ours):
        near_ties(target, texts, recorded)
    assert near_ties(target, ours, plain) <= 1, "near-ties are rare: 3 texts of 128 tokens"


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        ("bfloat16", "cpu"),
        # On a CPU test_float32_text states it of the golden pair, tests/drafts/test_lossless.py of every draft.
        pytest.param("float32", "cpu", marks=pytest.mark.slow),
        *(pytest.param(dtype, "cuda", marks=pytest.mark.gpu) for dtype in ABSOLUTE_MARGIN),
    ],
)
def test_embedded_pair_parts_at_near_ties_alone(dtype, device):
    target, draft = eagle_jax.from_pretrained(PAIR / "target", PAIR / "head", dtype=dtype)
    exact, _ = eagle_jax.from_pretrained(PAIR / "target", dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(PAIR / "target")
    tokens, lengths = eagle_jax.pad([tokenizer(text)["input_ids"] for text in CODE_TEXTS])
    plain = rows_of(eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=64))
    tree = TreeConfig(depth=4, top_k=4, num_nodes=12)
    out = eagle_jax.generate(target, draft, tokens, lengths, tree=tree, max_new_tokens=64)
    assert (np.asarray(out.cycles) < 63).all()
    texts = rows_of(out)
    found = differences(exact, [()] * len(texts), plain, texts, buckets=(256,))
    assert all(near_tie_absolute(difference.gap, dtype) for difference in found), list(map(str, found))
    assert len(found) <= {"float32": 1, "bfloat16": 4}[dtype], f"{len(found)} of {len(plain)} texts part"

    # The threshold excuses few places: at most of them the choice is clear.
    # A text at a time, by the program of `differences`.
    logits = np.concatenate([eagle_jax.forward(exact, *eagle_jax.pad([text], buckets=(256,)))[0] for text in texts])
    second, first = np.moveaxis(np.sort(np.asarray(logits), axis=-1)[..., -2:], -1, 0)
    index = np.arange(logits.shape[1])[None]
    new = (index >= np.asarray(lengths)[:, None]) & (index < np.asarray(out.lengths)[:, None])
    assert (first - second < ABSOLUTE_MARGIN[dtype])[new].mean() < 0.25
    assert logits.dtype == jnp.float32
