"""Lists the readings of a head's config.json that a measurement can tell apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.choices import HeadChoices
from eagle_jax.convert.heads.dialects import DIALECTS
from eagle_jax.convert.heads.reading import dialect_of, leaves_open
from eagle_jax.convert.heads.taps import INPUTS, OUTPUTS, stated_ids
from eagle_jax.convert.read import Checkpoint
from eagle_jax.drafts.eagle.config import tap_layers


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Describes one reading. choices: what loads it, with the taps as layers whose input is read."""

    words: str
    choices: HeadChoices


def candidates(checkpoint: Checkpoint, choices: HeadChoices, num_layers: int) -> list[Candidate]:
    """Lists the readings of an EAGLE-3 head's taps, and of the norms that its config leaves open.

    norm_output changes the second drafted token, and not the first.

    Args:
      choices: what the caller settles. num_layers: of the target.
    Raises:
      CheckpointError: for a head with one reading only, because the caller chose its layers.
    """
    hf, where = checkpoint.config, str(checkpoint.config_path)
    dialect = DIALECTS[dialect_of(hf, checkpoint.tensors.keys() | checkpoint.faults.keys())]
    left_open = leaves_open(hf, dialect, choices)
    if isinstance(choices.taps, tuple):
        if not left_open:
            raise CheckpointError(f"{where}: --taps lists the layers, so that there is nothing to measure")
        taps = [(choices.taps, "the layers of --taps")]
    else:
        taps = list(_taps(hf, where, num_layers))
    flags = sorted(left_open)
    values = itertools.product((False, True), repeat=len(flags))
    settings: list[dict[str, Any]] = [dict(zip(flags, of_each, strict=True)) for of_each in values]
    found: dict[HeadChoices, str] = {}
    for (layers, words), chosen in itertools.product(taps, settings):
        words += "".join(f", {name} = {str(value).lower()}" for name, value in chosen.items())
        found.setdefault(dataclasses.replace(choices, taps=layers, **chosen), words)
    return [Candidate(words, one) for one, words in found.items()]


def _taps(hf: Mapping[str, Any], where: str, num_layers: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields the layers of each reading: of the ids of a config, or the official ones and their neighbours."""
    stated = list(stated_ids(hf, where))
    if stated:
        readings = [(one.read_as(named), f"{one.place} names {named}") for one in stated for named in (INPUTS, OUTPUTS)]
    else:
        official = tap_layers(None, num_layers)
        steps = {0: "the official layers", -1: "one layer lower", 1: "one layer higher"}
        readings = [(tuple(layer + step for layer in official), words) for step, words in steps.items()]
    yield from ((layers, words) for layers, words in readings if min(layers) >= 0 and max(layers) <= num_layers)
