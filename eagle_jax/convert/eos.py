"""Collects the ids that end a target's text, from its configs and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import read_json

CONFIGS = ("config.json", "generation_config.json")


def eos_tokens(folder: Path, vocab_size: int, tokenizer: Any) -> tuple[int, ...]:
    """Reads the ids that end a text: `eos_token_id` of both configs and of the tokenizer.

    Chat models need all three: often only the tokenizer names the token that ends a turn.

    Args:
      folder: holds the target's config.json and generation_config.json; each may be missing.
      vocab_size: ids outside it are dropped: some configs hold -1, or an id of another vocabulary.
      tokenizer: the target's; None if it has none.
    Raises:
      CheckpointError: naming a config whose `eos_token_id` is no token id.
    """
    ids = {tokenizer.eos_token_id} if getattr(tokenizer, "eos_token_id", None) is not None else set()
    for path in (folder / name for name in CONFIGS):
        ids |= _ids(path) if path.is_file() else set()
    return tuple(sorted(id for id in ids if 0 <= id < vocab_size))


def _ids(path: Path) -> set[int]:
    """Reads the `eos_token_id` of a config: none, one id or a list of them."""
    value = read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [id for id in ids if type(id) is not int]  # a bool is no id
    if wrong:
        raise CheckpointError(
            f"{path}: eos_token_id is {json.dumps(value)}, where {json.dumps(wrong[0])} is no token id; "
            "write one number, such as 2, or a list of numbers, such as [2, 5]"
        )
    return set(ids)
