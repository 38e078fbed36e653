"""Lists and copies the small files of a target: those of its tokenizer, chat templates and generation defaults."""

from __future__ import annotations

import shutil
from pathlib import Path

# Patterns below a model's folder; they match the files of every tokenizer class.
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
    """Copies the small files of a folder to another; returns their paths below it, sorted."""
    paths = small_files(source)
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return paths


def small_files(folder: Path) -> list[str]:
    """Returns the paths of a folder's small files below it, sorted."""
    found = {file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in found)
