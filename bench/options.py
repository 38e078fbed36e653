"""Types of the options that several measurements take."""

from __future__ import annotations

import argparse

from eagle_jax.tree import TreePolicy
from eagle_jax.tree.named import tree_named


def positive(text: str) -> int:
    """Parses a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse_tree(text: str) -> TreePolicy:
    """Parses a tree, such as 8,10,60."""
    try:
        return tree_named(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
