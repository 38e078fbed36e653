"""Reads official checkpoints and GGUF files, writes and loads converted folders, and exports heads.

May import drafts and everything below them, never decode. Packages of file formats are imported in functions.
"""

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.exporting import export
from eagle_jax.convert.heads.choices import HeadChoices
from eagle_jax.convert.loading import from_pretrained, load, load_draft
from eagle_jax.convert.official import to_official
from eagle_jax.convert.tokenizing import tokenizer
from eagle_jax.convert.write import convert

__all__ = [
    "CheckpointError",
    "HeadChoices",
    "convert",
    "export",
    "from_pretrained",
    "load",
    "load_draft",
    "to_official",
    "tokenizer",
]
