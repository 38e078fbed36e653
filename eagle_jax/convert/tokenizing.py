"""Loads tokenizers; names missing files and packages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from eagle_jax.convert import converted
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.read import folder_of
from eagle_jax.convert.small_files import small_files

# Files that only the sentencepiece library reads; their first byte; {module: package} needed for them.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
FIRST_BYTE = b"\n"  # a tiktoken file may have the same name; it begins with a letter
NEEDED = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model")  # a folder with one of these has a tokenizer, usable or not


def tokenizer(
    path: str | Path, *, revision: str | None = None, token: str | bool | None = None, local_files_only: bool = False
) -> Any:
    """Loads the transformers tokenizer of a converted folder, a Hugging Face folder or hub id, or a GGUF file.

    Args:
      revision, token, local_files_only: of a hub id; see `from_pretrained`.
    Raises:
      CheckpointError: if tokenizer files are missing or damaged, or a package that reads them is missing.
    """
    if converted.is_conversion(Path(path)):
        folder = Path(path) / converted.TARGET
    else:
        folder = folder_of(path, Hub(revision, token, local_files_only), weights=False)
    try:
        return _class(folder).from_pretrained(str(folder))
    except Exception as error:  # the tokenizer libraries raise bare Exceptions for damaged files
        model, missing = _sentencepiece(folder)
        if missing:
            raise CheckpointError(
                f"{folder / model}: reading this tokenizer needs the package{'s' * (len(missing) > 1)} "
                f"{' and '.join(missing)}: pip install 'eagle-jax[sentencepiece]'"
            ) from error
        raise CheckpointError(f"{folder}: no usable tokenizer files (tokenizer.json, ...): {error}") from error


def tokenizer_of(folder: Path) -> Any | None:
    """Loads a folder's tokenizer; None if it has no tokenizer files. Raises CheckpointError for unusable ones."""
    there = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    return tokenizer(folder) if there else None


def _class(folder: Path) -> Any:
    """Returns the tokenizer class that a folder names. Spares the lookup of `AutoTokenizer`, which takes seconds."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None  # damaged or missing: AutoTokenizer has the better message
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _sentencepiece(folder: Path) -> tuple[str, list[str]]:
    """Returns a folder's SentencePiece file and the missing packages that read it; ("", []) if it needs none."""
    files = small_files(folder)
    model = next((file for file in files if file.startswith(SENTENCEPIECE)), "")
    if not model or "tokenizer.json" in files or (folder / model).read_bytes()[:1] != FIRST_BYTE:
        return "", []
    return model, [package for module, package in NEEDED.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
