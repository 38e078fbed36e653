"""The streaming detokenizer: pieces that add up to the text decoded at once, of whole characters only."""

from __future__ import annotations

import functools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import eagle_jax
from eagle_jax import Detokenizer
from eagle_jax.measure.samples import embedded_pair

TEXT = "x = '日本語 🎉'  # naïve\n\tй"
WORDS = ["▁", "▁▁", "▁Hello", "▁world", "He", "llo", ",", "\n", "▁a", "é", "本"]


@functools.cache
def sentencepiece(decoder: str = "strip") -> PreTrainedTokenizerFast:
    """Words that begin with a space, dropped at the start of a text, and a token for every byte: as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    fallback = decoders.ByteFallback()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), fallback, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        if decoder == "strip"
        else [fallback, decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def byte_level():
    return eagle_jax.tokenizer(embedded_pair() / "target")


def byte_ids(data: bytes) -> list[int]:
    return sentencepiece().convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])


def at_once(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids) -> list[str]:
    """What each token gave, and the end."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add([token]) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("make", [byte_level, ByT5Tokenizer], ids=["fast", "slow"])
def test_characters_come_whole(make):
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""
    assert pieces.count("") >= 10, "every character came in one token: nothing was held back"


@pytest.mark.parametrize("decoder", ["strip", "metaspace"])
def test_pieces_add_up_to_the_text(decoder):
    """Of random tokens: spaces before words, characters in bytes (U+FFFD is one, too), special tokens between."""
    tokenizer, rng = sentencepiece(decoder), random.Random(0)
    words, specials = tokenizer.convert_tokens_to_ids(WORDS), tokenizer.all_special_ids
    for _ in range(300):
        ids = []
        for kind in rng.choices(["word", "bytes", "special"], [5, 4, 1], k=rng.randint(1, 12)):
            if kind == "bytes":
                ids += byte_ids(rng.choice("日本🎉é a\ufffd").encode())
            else:
                ids.append(rng.choice(words if kind == "word" else specials))
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == at_once(tokenizer, ids), ids
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.add(ids[:3]) + detokenizer.add(ids[3:]) + detokenizer.finish() == "".join(pieces)


def test_spaces_between_pieces():
    ids = sentencepiece().convert_tokens_to_ids(["<s>", "▁Hello", "</s>", "▁world", ",", "▁a"])
    assert pieces_of(sentencepiece(), ids) == ["", "Hello", "", " world", ",", " a", ""]


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        ("é".encode() + "🎉".encode()[:3], ["", "é", "", "", "", "\ufffd\ufffd\ufffd"]),  # it ends in half a character
        (b"\x80", ["", "\ufffd"]),
    ],
)
def test_broken_characters_at_the_end(data, pieces):
    assert pieces_of(sentencepiece(), byte_ids(data)) == pieces
    assert pieces_of(byte_level(), byte_level().convert_tokens_to_ids(["Ã"]))[-1] == "\ufffd"


def test_broken_characters_within():
    """A word ends them; and where none does, they are not held back for ever."""
    tokenizer = sentencepiece()
    a = tokenizer.convert_tokens_to_ids("▁a")
    assert pieces_of(tokenizer, [*byte_ids("é".encode() + b"\x80"), a]) == ["", "é", "", "\ufffd a", ""]
    pieces = pieces_of(tokenizer, byte_ids(b"\x80" * 100))
    assert "".join(pieces) == "\ufffd" * 100 and len(pieces[-1]) < 20


def test_work_per_token_does_not_grow():
    decoded = []

    class Counting:
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return byte_level().decode(ids, **options)

    pieces_of(Counting(), byte_level()(TEXT * 20, add_special_tokens=False)["input_ids"])
    assert max(decoded) <= 8
    decoded.clear()
    ids = byte_level()("\ufffd" * 200, add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(Counting(), ids)) == "\ufffd" * 200 and max(decoded) <= 32


@pytest.mark.parametrize("character", ["é", "本", "🎉", "\ufffd"])
def test_bytes_after_a_broken_character_stay_broken(character):
    """However many they are, though they would be characters by themselves."""
    for before in (b"\xff", b"\xff\xff", b"\xff\xff\xff"):
        data = before + character.encode() * 40
        for ids in (byte_ids(data), byte_ids(data[:-1])):
            assert "".join(pieces_of(sentencepiece(), ids)) == at_once(sentencepiece(), ids)


def test_special_tokens_may_be_shown():
    ids = sentencepiece().convert_tokens_to_ids(["▁Hello", "</s>"])
    assert Detokenizer(sentencepiece(), skip_special_tokens=False).add(ids) == "Hello</s>"


def test_ids_of_any_library():
    detokenizer = Detokenizer(byte_level())
    ids = byte_level()("def f", add_special_tokens=False)["input_ids"]
    assert detokenizer.add([]) == detokenizer.add(jnp.zeros(0, jnp.int32)) == ""
    for array in (ids, np.array(ids), jnp.array(ids), tuple(ids)):
        assert detokenizer.add(array) + detokenizer.finish() == "def f"
    with pytest.raises(ValueError, match=r"ids must be those of one row, \[T\]; got shape \[1, 2\]"):
        detokenizer.add([[1, 2]])
