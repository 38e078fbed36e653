"""Reads heads that draft blocks, of every dialect: recognises it, and settles what every field of config.json means."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.blocks import BLOCK_REFUSED, BLOCKS, LAYER_FIELDS, BlockDialect
from eagle_jax.convert.heads.choices import HeadChoices, HeadReading
from eagle_jax.convert.heads.dialects import HARMLESS
from eagle_jax.convert.heads.rules import official_of
from eagle_jax.convert.read import Checkpoint
from eagle_jax.drafts import dflash, dspark
from eagle_jax.drafts.dflash import CAUSAL, FROM_ROOT, INPUTS, MASK, OUTPUTS, OWN, TWO_WAYS
from eagle_jax.models.fields import NEUTRAL_VALUES, ConfigError, joined, require_equal, says_something

MODEL_TYPE, TIED = "model_type", "tie_word_embeddings"
KNOWN = joined(
    *(HARMLESS, LAYER_FIELDS, NEUTRAL_VALUES, dflash.READ_OWN, dflash.NEUTRAL_OWN, dspark.READ_HEADS),
    dspark.NEUTRAL_OWN,
)
ONE_WAY = (TWO_WAYS, *CAUSAL)  # fields that say what a token sees of its block
Found = dict[str, tuple[Any, str]]


def drafts_blocks(tensor_names: Collection[str]) -> bool:
    """Returns whether these are the tensors of a head that drafts blocks."""
    return names.dflash_table({name.removeprefix(names.PREFIX) for name in tensor_names}) is not None


def read_block(checkpoint: Checkpoint, choices: HeadChoices) -> tuple[Checkpoint, HeadReading]:
    """Translates the checkpoint of a head that drafts blocks to official tensor names, and reads its config.json.

    Raises:
      CheckpointError: a tensor that is not implemented, or two of one name.
      ConfigError: an unknown field, or one with two meanings; the message names the option that chooses.
    """
    hf, where = checkpoint.config, str(checkpoint.config_path)
    present = checkpoint.tensors.keys() | checkpoint.faults.keys()
    key = block_dialect_of(hf, present)
    dialect = BLOCKS[key]
    for mark in dialect.marks:
        if dialect.types and hf.get(mark) not in list(dialect.types):
            accepted = ", ".join(map(repr, dialect.types))
            raise ConfigError(f"{where}: {mark} = {hf.get(mark)!r} is not implemented (accepted: {accepted})")
    _refuse_unknown_fields(hf, dialect, where, choices.ignored)
    flat = _flat(hf, dialect, where)
    found = _windows(flat, dialect, where, choices) | _taps(flat, dialect, where, choices)
    found |= _chosen(flat, dialect, where, choices)
    if flat.get(MODEL_TYPE) in list(dialect.layers):
        layer = dialect.layers[flat[MODEL_TYPE]]
        found[MODEL_TYPE] = layer, f"{dialect.title}'s layers of such heads are {layer}'s, whatever the config names"
    for name, value in dialect.implied.items():
        if name not in found and _absent(flat, *(ONE_WAY if name in ONE_WAY else (name,))):
            found[name] = value, f"{dialect.title} means it"
    reading = HeadReading(
        key,
        {name: value for name, (value, _) in found.items()},
        {name: reason for name, (value, reason) in found.items() if value is not None},
    )
    return _official(checkpoint, dialect), reading


def block_config(hf: Mapping[str, Any], reading: HeadReading) -> dict[str, Any]:
    """Returns a config.json with all fields at the top level, in which every field has one meaning."""
    return _flat(hf, BLOCKS[reading.dialect], "config.json") | dict(reading.fields)


def block_dialect_of(hf: Mapping[str, Any], tensor_names: Collection[str]) -> str:
    """Returns the first dialect that a config.json or the tensor names show."""
    named = hf.get("architectures")
    architectures = {str(name) for name in named} if isinstance(named, list) else set()
    for key, dialect in BLOCKS.items():
        if architectures.intersection(dialect.architectures) or hf.keys() & set(dialect.marks):
            return key
        if dialect.tensors is not None and any(re.fullmatch(dialect.tensors, name) for name in tensor_names):
            return key
    return "block"


def _official(checkpoint: Checkpoint, dialect: BlockDialect) -> Checkpoint:
    """Gives the tensors and faults of a checkpoint their official names."""
    where = str(checkpoint.folder)
    official: dict[str, str] = {}
    for name in sorted(checkpoint.tensors.keys() | checkpoint.faults.keys()):
        bare = name.removeprefix(names.PREFIX)
        for pattern, what in BLOCK_REFUSED.items():
            if re.fullmatch(pattern, bare):
                raise CheckpointError(f"{where}: tensor {name!r} belongs to {what}, which is not implemented")
        bare = official_of(bare, dialect.rules)
        if bare in official:
            raise CheckpointError(f"{where}: {official[bare]!r} and {name!r} stand for the same tensor; remove one")
        official[bare] = name
    tensors = {bare: checkpoint.tensors[name] for bare, name in official.items() if name in checkpoint.tensors}
    faults = {bare: checkpoint.faults[name] for bare, name in official.items() if name in checkpoint.faults}
    return dataclasses.replace(checkpoint, tensors=tensors, faults=faults)


def _places(hf: Mapping[str, Any], dialect: BlockDialect) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", hf
    for name in (dialect.layer, OWN):
        if isinstance(hf.get(name), Mapping):
            yield f"{name}.", hf[name]


def _refuse_unknown_fields(hf: Mapping[str, Any], dialect: BlockDialect, where: str, ignored: Collection[str]) -> None:
    """Raises ConfigError for a field that states something and is not known, at any place."""
    known = KNOWN.union(dialect.harmless, dialect.fields, dialect.marks, ignored)
    for place, fields in _places(hf, dialect):
        for name, value in fields.items():
            if name not in known and not name.startswith("_") and says_something(value):
                raise ConfigError(
                    f"{where}: {place}{name} = {value!r} is not known, and could change what the head computes; remove "
                    f"it if it does not, or name it in HeadChoices(ignored=...) (convert --ignore-field {name})"
                )


def _flat(hf: Mapping[str, Any], dialect: BlockDialect, where: str) -> dict[str, Any]:
    """Returns the fields of a config.json at the top level, under the names that are read.

    Those of the layers win where both may differ: the type of a layer, and what computes nothing.
    """
    if dialect.layer and not isinstance(hf.get(dialect.layer), Mapping):
        raise ConfigError(f"{where}: {dialect.layer} must be an object, got {hf.get(dialect.layer)!r}; it is damaged")
    flat: dict[str, Any] = {}
    stated: dict[str, str] = {}
    for place, fields in reversed(list(_places(hf, dialect))):
        for spelling, value in fields.items():
            name = dialect.fields.get(spelling, spelling)
            if name in (OWN, dialect.layer) or (place == f"{OWN}." and name in dialect.harmless) or value is None:
                continue
            if flat.get(name) is not None and name not in HARMLESS and name not in (MODEL_TYPE, TIED):
                require_equal({f"{place}{spelling}": value, stated[name]: flat[name]}, where)
            flat.setdefault(name, value)
            stated.setdefault(name, f"{place}{spelling}")
    return flat


def _absent(flat: Mapping[str, Any], *fields: str) -> bool:
    return all(flat.get(name) is None for name in fields)


def _windows(flat: Mapping[str, Any], dialect: BlockDialect, where: str, choices: HeadChoices) -> Found:
    """Settles what a token of a block sees of it in layers with a window, which files of one form mean differently."""
    kinds = flat.get("layer_types") or ()
    slides = isinstance(kinds, list | tuple) and "sliding_attention" in kinds
    if choices.causal_windows is not None:
        return {TWO_WAYS: (not choices.causal_windows, "as chosen"), **dict.fromkeys(CAUSAL, (None, ""))}
    stated = not _absent(flat, *ONE_WAY) or not _absent(dialect.implied, *ONE_WAY)
    if not slides or flat.get("use_swa") or stated:
        return {}
    raise ConfigError(
        f"{where}: layer_types names layers with a window, but not what a token of a block sees of the block there: "
        "SpecForge and vLLM let it see those before it, NeMo Automodel all of them. Choose with "
        "HeadChoices(causal_windows=True) or False (eagle-jax convert --causal-windows)"
    )


def _taps(flat: Mapping[str, Any], dialect: BlockDialect, where: str, choices: HeadChoices) -> Found:
    """Settles which layers the head reads."""
    stated = [(name, flat[name]) for name in (OUTPUTS, INPUTS) if says_something(flat.get(name))]
    if isinstance(choices.taps, tuple):
        return {INPUTS: (list(choices.taps), "as chosen"), OUTPUTS: (None, "")}
    if not stated:
        raise ConfigError(
            f"{where}: {INPUTS if dialect.inputs else OUTPUTS} is missing, so which layers are read cannot be known; "
            "list the layers whose input is read with HeadChoices(taps=...) (eagle-jax convert --taps 2,10,18)"
        )
    if choices.taps is None:
        return {}
    wanted = INPUTS if choices.taps == "inputs" else OUTPUTS
    return {name: (None, "") for name in (INPUTS, OUTPUTS)} | {wanted: (list(stated[0][1]), "as chosen")}


def _chosen(flat: Mapping[str, Any], dialect: BlockDialect, where: str, choices: HeadChoices) -> Found:
    """Settles the mask token, and whether the root's output predicts a token."""
    found: Found = {}
    # A DFlash head of speculators means false by an absent field, as its readers do.
    open_root = FROM_ROOT in dialect.required and any(flat.get(mark) == "dspark" for mark in dialect.marks)
    for name, chosen, option, what, needed in (
        (MASK, choices.mask_token, "mask_token", "the token that stands for one to predict", True),
        (FROM_ROOT, choices.from_root, "from_root", "whether the output at the root predicts a token", open_root),
    ):
        if chosen is not None:
            found[name] = chosen, "as chosen"
        elif needed and _absent(flat, name):
            raise ConfigError(
                f"{where}: {name} is missing, {what}; take it from the configuration of the head's training. Choose it "
                f"with HeadChoices({option}=...) (eagle-jax convert --{option.replace('_', '-')})"
            )
    return found
