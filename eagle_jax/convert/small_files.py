"""The small files that belong to a target beside its config and weights: what its tokenizer and its defaults need."""

from __future__ import annotations

import shutil
from pathlib import Path

# Patterns below a model's folder. Whatever the tokenizer's class, its files are among these.
SMALL_FILES = (
    "tokenizer.json",
    "tokenizer.*.json",  # of certain versions of transformers
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def copy_small_files(source: Path, folder: Path) -> list[str]:
    """Copies them from one folder to another; returns their paths below it, sorted."""
    paths = small_files(source)
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return paths


def small_files(folder: Path) -> list[str]:
    """The paths below a folder of those that are there, sorted."""
    found = {file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in found)
