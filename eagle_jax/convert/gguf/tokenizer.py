"""Writes the tokenizer files of a GGUF file's model from its metadata: tokenizer.json, its config, chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.gguf.header import Header

KEY = "tokenizer.ggml."
# Types of tokens, by their number in the format.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

SPACE = "▁"  # stands for a space in vocabularies of SentencePiece
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

# How a text is cut before byte-level BPE, by the name in the file: the regular expression, digits one by one.
CUTS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),  # None: GPT-2's expression, which the library has
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (None, True)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "pixtral"),
        (rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}", False),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}", False)),
}
# Of these, a piece of the text that is a token is not built from merges, and a text begins with bos by default.
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")

TEMPLATE = "tokenizer.chat_template"


def tokenizer_files(header: Header) -> dict[str, bytes]:
    """Returns {path in a model's folder: bytes}; empty for a file without a vocabulary.

    Raises:
      CheckpointError: a kind of vocabulary that is not read, or a damaged one.
    """
    metadata, where = header.metadata, str(header.path)
    kind = metadata.get(KEY + "model")
    if kind is None:
        return {}
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{where}: its vocabulary is of kind {kind!r}; 'gpt2' and 'llama' are read")
    vocabulary = _Vocabulary(metadata, where)
    described = _byte_level(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    text = json.dumps(described, ensure_ascii=False)
    try:
        from tokenizers import Tokenizer

        Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{where}: its vocabulary is damaged ({error}); download the file again") from error
    settings = vocabulary.settings() | {"model_max_length": metadata.get("llama.context_length")}
    files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2)}
    return {path: content.encode() for path, content in (files | _templates(metadata, where)).items()}


class _Vocabulary:
    """Reads the vocabulary of a file's metadata: tokens, types and special ids."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.tokens = self.array("tokens", str)
        self.types = self.array("token_type", int, [1] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise self.damaged(f"{len(self.types)} types of {len(self.tokens)} tokens")
        self.ids: dict[str, int] = {}
        for id, token in enumerate(self.tokens):
            self.ids.setdefault(token, id)

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: its vocabulary has {what}; the file is damaged, download it again")

    def array(self, name: str, type: type, default: list[Any] | None = None) -> list[Any]:
        """Reads a list of the metadata."""
        values = self.metadata.get(KEY + name, default)
        if not isinstance(values, list) or not all(isinstance(value, type) for value in values):
            raise self.damaged(f"no list {KEY}{name}")
        return values

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.metadata.get(f"{KEY}{name}", default))

    def special(self, name: str, default: int | None = None) -> str | None:
        """Returns the token of a special id; None if the file has no such id."""
        id = self.metadata.get(f"{KEY}{name}_token_id", default)
        if id is None:
            return None
        if type(id) is not int or not 0 <= id < len(self.tokens):
            raise self.damaged(f"{len(self.tokens)} tokens and {name}_token_id {id!r}")
        return self.tokens[id]

    @property
    def is_sentencepiece(self) -> bool:
        return self.metadata[f"{KEY}model"] == "llama"

    def special_tokens(self) -> dict[str, str]:
        """Returns {field of tokenizer_config.json: token}."""
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if self.is_sentencepiece else {}
        fields = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        found = {field: self.special(name, defaults.get(name)) for name, field in fields.items()}
        return {field: token for field, token in found.items() if token is not None}

    def settings(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens(),
        }

    def described(self, model: dict[str, Any], bos: bool, **steps: Any) -> dict[str, Any]:
        """Builds a tokenizer.json.

        Args:
          bos: whether a text begins with bos where the file does not say so.
          steps: the normalizer, pre_tokenizer and decoder.
        """
        whole = [(id, type) for id, type in enumerate(self.types) if type in (UNKNOWN, CONTROL, USER_DEFINED)]
        added = [
            {
                "id": id,
                "content": self.tokens[id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": type != USER_DEFINED,
            }
            for id, type in whole
        ]
        blank = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
        model = {"type": "BPE", "dropout": None, "vocab": self.ids, **model}
        return blank | steps | {"post_processor": self.ends(bos), "model": model}

    def ends(self, bos: bool) -> dict[str, Any] | None:
        """Builds the post-processor that adds bos and eos, if the file asks for them."""
        specials = self.special_tokens()
        before = [specials["bos_token"]] if self.flag("add_bos_token", bos) and "bos_token" in specials else []
        after = [specials["eos_token"]] if self.flag("add_eos_token", False) and "eos_token" in specials else []
        if not before and not after:
            return None

        def around(name: str, type_id: int) -> list[dict[str, Any]]:
            pieces = [("SpecialToken", token) for token in before] + [("Sequence", name)]
            pieces += [("SpecialToken", token) for token in after]
            return [{kind: {"id": id, "type_id": type_id}} for kind, id in pieces]

        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": around("A", 0) + around("B", 1),
            "special_tokens": {
                token: {"id": token, "ids": [self.ids[token]], "tokens": [token]} for token in (*before, *after)
            },
        }


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Builds the tokenizer.json of byte-level BPE."""
    cut = vocabulary.metadata.get(f"{KEY}pre")
    if cut not in CUTS:
        raise CheckpointError(
            f"{vocabulary.where}: {KEY}pre is {cut!r}: how this vocabulary cuts a text into words is not implemented "
            f"(known: {', '.join(CUTS)})"
        )
    expression, digits = CUTS[cut]
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if digits else []
    if expression is not None:
        pattern = {"Regex": expression}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append(byte_level | {"use_regex": expression is None})
    merges = vocabulary.array("merges", str)
    # A space separates the two; it never begins a piece, whose spaces are written as another letter.
    pairs = [[merge[: merge.find(" ", 1)], merge[merge.find(" ", 1) + 1 :]] for merge in merges]
    return vocabulary.described(
        {"merges": pairs, "ignore_merges": cut in WHOLE_PIECES},
        bos=cut in WHOLE_PIECES,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=byte_level | {"use_regex": True},
    )


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Builds the tokenizer.json of a SentencePiece vocabulary: merges by score, and a token for each byte."""
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    undone = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    behind = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return vocabulary.described(
        {
            "unk_token": vocabulary.special("unknown", 0),
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": _merges_by_score(vocabulary),
        },
        bos=True,
        normalizer={"type": "Sequence", "normalizers": [*before, spaces]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [undone, {"type": "ByteFallback"}, {"type": "Fuse"}, *behind]},
    )


def _merges_by_score(vocabulary: _Vocabulary) -> list[list[str]]:
    """Returns all pairs of tokens whose concatenation is a token, by descending score of that token."""
    ids, scores = vocabulary.ids, vocabulary.array("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.damaged(f"{len(scores)} scores of {len(vocabulary.tokens)} tokens")
    built = [id for id, type in enumerate(vocabulary.types) if type not in (UNKNOWN, CONTROL)]
    ways = [
        (-scores[id], ids[token[:i]], ids[token[i:]])
        for id in built
        for token in [vocabulary.tokens[id]]
        for i in range(1, len(token))
        if token[:i] in ids and token[i:] in ids
    ]
    return [[vocabulary.tokens[left], vocabulary.tokens[right]] for _, left, right in sorted(ways)]


def _templates(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """Returns the files of the chat template and of further named ones."""
    files = {"chat_template.jinja": metadata[TEMPLATE]} if isinstance(metadata.get(TEMPLATE), str) else {}
    for key, text in metadata.items():
        if key.startswith(f"{TEMPLATE}.") and isinstance(text, str):
            name = key.removeprefix(f"{TEMPLATE}.")
            if not re.fullmatch(r"[\w-]+", name):
                raise CheckpointError(f"{where}: a chat template is called {name!r}, which is no name; refused")
            files[f"additional_chat_templates/{name}.jinja"] = text
    return files
