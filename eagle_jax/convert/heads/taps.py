"""Decides which layers an EAGLE-3 head reads, from ids that name inputs in some configs and outputs in others.

The output of layer i is the input of layer i + 1, so a wrong reading taps each layer one off. Such a head still loads
and drafts, but few of its tokens are accepted. What cannot be known is therefore an error, not a default.

    a target of 32 layers; the official heads read the inputs of 2, 16 and 29:
    inputs [2, 16, 29] = outputs [1, 15, 28]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from eagle_jax.convert.heads.dialects import HeadDialect
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.drafts.eagle.flat_config import NVIDIA, PLACES, TAPS
from eagle_jax.models.fields import ConfigError, layer_indices, says_something

INPUTS, OUTPUTS = "inputs", "outputs"
OUTPUT_IDS = "target_layer_ids"  # names outputs in every framework
# Written by our exports where a reader could not tell.
OUR_TAPS, OUR_NORM_OUTPUT = "eagle_jax_tap_inputs", "eagle_jax_norm_output"


@dataclasses.dataclass(frozen=True)
class Taps:
    """Holds the layers whose input a head reads, None for the official ones, and the reason for this reading."""

    inputs: tuple[int, ...] | None
    because: str


@dataclasses.dataclass(frozen=True)
class Stated:
    """Holds one list of ids as a config.json states it, and the place of the field."""

    place: str
    ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.place} {list(self.ids)}"

    def read_as(self, meaning: str) -> tuple[int, ...]:
        """Returns the layers whose input is read, if the ids name inputs or outputs."""
        return self.ids if meaning == INPUTS else tuple(layer + 1 for layer in self.ids)


def read_taps(
    hf: Mapping[str, Any],
    dialect: HeadDialect,
    where: str,
    num_layers: int | None,
    choice: str | tuple[int, ...] | None = None,
) -> Taps:
    """Decides which layers an EAGLE-3 head reads.

    Args:
      hf: its config.json.
      where: the name of that file, for messages.
      num_layers: of the target, if it is known.
      choice: "inputs" or "outputs", what the ids name; or the layers whose input is read; None: by `meaning_of`.
    Raises:
      ConfigError: for ids that may name either, naming both readings; or two fields that contradict each other.
    """
    if isinstance(choice, tuple):
        return Taps(choice, "as chosen")
    stated = list(stated_ids(hf, where))
    if choice is not None:
        if not stated:
            raise ConfigError(f"{where}: names no layers, so taps={choice!r} has no ids to read; list the layers")
        _require_alike(stated, [one.read_as(choice) for one in stated], where)
        return Taps(stated[0].read_as(choice), f"{stated[0]} names {choice}, as chosen")
    if hf.get(OUR_TAPS):
        return Taps(layer_indices(OUR_TAPS, hf[OUR_TAPS], where), f"{OUR_TAPS} names inputs")
    if not stated:
        return Taps(None, f"{where.rpartition('/')[2]} names no layers, so they are the official ones")
    meanings = [meaning_of(one, dialect, num_layers) for one in stated]
    known = [(one, *meaning) for one, meaning in zip(stated, meanings, strict=True) if meaning]
    if not known:
        raise ConfigError(_both_readings(stated[0], where))
    (first, meaning, reason), inputs = known[0], known[0][0].read_as(known[0][1])
    _require_alike([one for one, *_ in known], [one.read_as(named) for one, named, _ in known], where)
    for one in stated:
        if inputs not in (one.read_as(INPUTS), one.read_as(OUTPUTS)):
            _require_alike([first, one], [inputs, one.ids], where)
    return Taps(inputs, f"{first} names {meaning}: {reason}")


def meaning_of(stated: Stated, dialect: HeadDialect, num_layers: int | None) -> tuple[str, str] | None:
    """Returns what the ids of a field name, INPUTS or OUTPUTS, and why; None if either may be meant."""
    field = stated.place.rpartition(".")[2]
    if field == OUTPUT_IDS:
        return OUTPUTS, f"{OUTPUT_IDS} does in every framework"
    if dialect.taps is not None:
        return dialect.taps, f"{dialect.title} writes it so"
    if NVIDIA not in stated.place.split("."):
        return INPUTS, "at the top level, as vLLM reads it"
    if stated.ids[0] <= 1:
        return OUTPUTS, f"it begins with {stated.ids[0]}"
    if num_layers is not None and stated.ids[-1] == num_layers:
        return INPUTS, f"the target has no layer {num_layers}, whose output that would be"
    if num_layers is not None and stated.ids == tap_layers(None, num_layers):
        return INPUTS, "they are the layers whose inputs the official heads read"
    return None


def without_taps(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json without the fields that name tapped layers, at every place."""
    return {
        name: without_taps(value) if name in PLACES and isinstance(value, Mapping) else value
        for name, value in hf.items()
        if name not in (TAPS, OUTPUT_IDS, OUR_TAPS)
    }


def stated_ids(fields: Mapping[str, Any], where: str, place: str = "") -> Iterator[Stated]:
    """Yields the lists of ids of a config.json, from every place."""
    for name in (TAPS, OUTPUT_IDS):
        if says_something(fields.get(name)):
            yield Stated(f"{place}{name}", layer_indices(f"{place}{name}", fields[name], where))
    for name in PLACES:
        if isinstance(fields.get(name), Mapping):
            yield from stated_ids(fields[name], where, f"{place}{name}.")


def _require_alike(stated: list[Stated], inputs: list[tuple[int, ...]], where: str) -> None:
    if len(set(inputs)) > 1:
        values = {one.place: list(layers) for one, layers in zip(stated, inputs, strict=True)}
        raise ConfigError(
            f"{where}: {' and '.join(values)} name different layers: inputs of {values}; keep one, or choose the "
            "layers with HeadChoices(taps=...) (eagle-jax convert --taps)"
        )


def _both_readings(stated: Stated, where: str) -> str:
    inputs, outputs = (list(stated.read_as(meaning)) for meaning in (INPUTS, OUTPUTS))
    return (
        f"{where}: {stated} may name layers whose input the head reads (the inputs of {inputs}) or whose output (the "
        f"inputs of {outputs}); frameworks differ. Choose with HeadChoices(taps='inputs') or 'outputs' (eagle-jax "
        "convert --taps), or measure both with --check-taps"
    )
