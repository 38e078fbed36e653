"""eagle-jax convert --check-taps: measures which layers a head reads, where its config can be read in several ways."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.api import generate
from eagle_jax.convert import HeadChoices
from eagle_jax.convert.heads.candidates import Candidate, candidates
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.loading import from_pretrained, load_draft
from eagle_jax.convert.read import folder_of, open_checkpoint
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.measure import samples
from eagle_jax.measure.drafted_tokens import Share, best_of, drafted_tokens
from eagle_jax.models.config import ConfigError

NEW_TOKENS = 64  # of each continuation, every one of which is a sample


def check(args: argparse.Namespace, choices: HeadChoices) -> HeadChoices | None:
    """Measures every reading of a head, prints a table, and says which is right.

    Args:
      args: target, draft, their revisions, dtype, prompts.
    Returns:
      The choices of the reading that is right; None if the measurement does not tell.
    Raises:
      CheckpointError, ConfigError: as `from_pretrained`, and for a draft that reads no layers.
    """
    from rich.console import Console

    if args.draft is None:
        raise ValueError("--check-taps measures a head: name it with --draft")
    target, _ = from_pretrained(args.target, None, dtype=args.dtype, revision=args.revision)
    checkpoint = open_checkpoint(args.draft, Hub(args.draft_revision))
    readings = candidates(checkpoint, choices, target.config.num_layers)
    folder = folder_of(args.target, Hub(args.revision))
    fits = functools.partial(_check_prompt, vocab_size=target.config.vocab_size)
    token_lists, source = samples.to_measure(args.prompts, folder, False, samples.DEFAULT_TEXTS, fits)
    tokens, lengths = _padded(token_lists)
    texts = generate(target, None, tokens, lengths, max_new_tokens=NEW_TOKENS)
    rates = []
    for reading in readings:
        draft = load_draft(args.draft, target, dtype=args.dtype, revision=args.draft_revision, head=reading.choices)
        if not isinstance(draft, EagleDraft):
            raise ConfigError(f"{args.draft}: a {type(draft).__name__} reads no layers of the target")
        rates.append(drafted_tokens(target, draft, texts.tokens, lengths, texts.lengths))
    console = Console(highlight=False)
    console.print(f"drafted tokens that are the target's, over {NEW_TOKENS} tokens after {source}", markup=False)
    console.print(_table(readings, rates))
    best = best_of(rates)
    if best is None:
        console.print("the measurement does not tell: the best two are within two standard errors", markup=False)
        return None
    layers = ",".join(map(str, readings[best].choices.taps or ()))
    console.print(f"right: {readings[best].words} (--taps {layers})", markup=False)
    return readings[best].choices


def _check_prompt(tokens: Sequence[int], vocab_size: int) -> None:
    if not tokens or max(tokens) >= vocab_size:
        raise ValueError("a prompt is empty, or has token ids outside the target's vocabulary")


def _padded(token_lists: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Returns prompts as one array, padded on the right, and their lengths."""
    lengths = np.array([len(tokens) for tokens in token_lists], np.int32)
    padded = np.zeros((len(lengths), lengths.max()), np.int32)
    for row, tokens in zip(padded, token_lists, strict=True):
        row[: len(tokens)] = tokens
    return jnp.asarray(padded), jnp.asarray(lengths)


def _table(readings: Sequence[Candidate], rates: Sequence[tuple[Share, ...]]) -> Any:
    from rich.table import Table

    table = Table("reading", "inputs of layers", "first token accepted", "second token", "of")
    for reading, shares in zip(readings, rates, strict=True):
        layers = ", ".join(map(str, reading.choices.taps or ()))
        table.add_row(reading.words, layers, *(f"{share.rate:.1%}" for share in shares), str(shares[0].positions))
    return table
