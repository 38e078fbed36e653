"""Reads heads of every dialect: recognises the dialect, and settles what every field of config.json means.

EAGLE heads are read here, heads that draft blocks in block_reading.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads import tensors
from eagle_jax.convert.heads.block_reading import block_config, drafts_blocks, read_block
from eagle_jax.convert.heads.blocks import BLOCKS
from eagle_jax.convert.heads.choices import HeadChoices, HeadReading
from eagle_jax.convert.heads.dialects import DIALECTS, HARMLESS, HeadDialect
from eagle_jax.convert.heads.taps import OUR_NORM_OUTPUT, OUR_TAPS, OUTPUT_IDS, read_taps, without_taps
from eagle_jax.convert.read import Checkpoint
from eagle_jax.drafts.eagle import flat_config
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.drafts.eagle.flat_config import PLACES, SPELLINGS_OF_KIND, TAPS
from eagle_jax.drafts.eagle.p_eagle import speculative_tokens
from eagle_jax.models.fields import ConfigError, says_something

NORM_OUTPUT, NORM_BEFORE_RESIDUAL, LAYERS = "norm_output", "norm_before_residual", "num_hidden_layers"
DRAFT_VOCABULARY = "draft_vocab_size"
NUM_DEPTHS, MASK_TOKEN = "num_depths", "mask_token_id"
# Norms of an EAGLE-1 head, by fields of a DraftConfig: their tensors.
NORMS = {
    "input_norms": (names.EAGLE1["embed_norm"], names.EAGLE1["hidden_norm"]),
    "attention_norm": (names.EAGLE1["layer.input_norm"],),
    "norm_output": (names.EAGLE1["norm"],),
}
MODEL_TYPE, LLAMA = "model_type", "llama"
KNOWN = frozenset(
    (*HARMLESS, *PLACES, *flat_config.MATHEMATICS, *flat_config.HARMLESS, TAPS, OUTPUT_IDS, OUR_TAPS, OUR_NORM_OUTPUT)
)


def read_head(
    checkpoint: Checkpoint, choices: HeadChoices | None = None, num_layers: int | None = None
) -> tuple[Checkpoint, HeadReading | None]:
    """Translates the checkpoint of a head to official tensor names, and reads its config.json.

    Args:
      choices: what the caller settles. num_layers: of the target, if it is known.
    Returns:
      The checkpoint and the reading; a checkpoint of another kind of draft as it is, and None.
    Raises:
      CheckpointError: a tensor that is not implemented, or that has no place in a head.
      ConfigError: an unknown field, or one with two meanings; the message names both and the option that chooses.
    """
    choices = choices or HeadChoices()
    if drafts_blocks(checkpoint.tensors.keys() | checkpoint.faults.keys()):
        _refuse_choices(checkpoint, choices, "norm_output", "norm_before_residual", "token_map", "num_depths")
        return read_block(checkpoint, choices)
    _refuse_choices(checkpoint, choices, "causal_windows", "from_root")
    if choices.token_map is not None:
        checkpoint = tensors.with_token_map(checkpoint, Path(choices.token_map))
    present = checkpoint.tensors.keys() | checkpoint.faults.keys()
    key = dialect_of(checkpoint.config, present)
    dialect, where = DIALECTS[key], str(checkpoint.config_path)
    official = set(tensors.official_names(present, dialect, str(checkpoint.folder)))
    official |= {name for name, (parts, _) in dialect.joined.items() if official.issuperset(parts)}
    eagle3 = names.eagle3_table(official) is not None
    eagle1 = not eagle3 and names.eagle1_table(official) is not None
    if not eagle3 and (choices.taps, choices.norm_output, choices.norm_before_residual) != (None, None, None):
        raise ConfigError(f"{checkpoint.folder}: is no EAGLE-3 head; only those have taps, and norms to choose")
    if not eagle1 and choices.token_map is not None:
        raise ConfigError(f"{checkpoint.folder}: is no EAGLE-1 head; only those take a token_map")
    peagle = names.peagle_table(official) is not None
    if not peagle and (choices.num_depths, choices.mask_token) != (None, None):
        raise ConfigError(
            f"{checkpoint.folder}: is no P-EAGLE head; only those have num_depths and a mask_token to choose"
        )
    if not eagle3 and not eagle1:
        return checkpoint, None
    translated = tensors.official_tensors(checkpoint, dialect)
    refuse_unknown_fields(checkpoint.config, dialect, where, choices.ignored)
    hf = _renamed(checkpoint.config, dialect)
    found = {
        **{
            name: (value, "the target's; the head attends to all positions")
            for name, value in dialect.of_target.items()
            if _stated(hf, name)
        },
        **_one_layer(hf, dialect, official),
        **_layer(hf, dialect),
        **(_depths(hf, where, choices) if peagle else {}),
        **(
            _flags(hf, dialect, where, choices) | _taps(hf, dialect, where, choices, num_layers)
            if eagle3
            else _norms(hf, dialect, official) | _frequent(hf, translated, where)
        ),
    }
    fields = {name: value for name, (value, _) in found.items() if value is not None}
    return translated, HeadReading(key, fields, {name: reason for name, (_, reason) in found.items()})


def head_config(hf: Mapping[str, Any], reading: HeadReading | None) -> Mapping[str, Any]:
    """Returns a config.json in which every field has one meaning, by a reading of it; None: as it is."""
    if reading is None:
        return hf
    if reading.dialect in BLOCKS:
        return block_config(hf, reading)
    plain = _without(_renamed(hf, DIALECTS[reading.dialect]), reading.fields.keys())
    return (without_taps(plain) if TAPS in reading.fields else plain) | dict(reading.fields)


def title_of(key: str) -> str:
    """Returns the title of the dialect of a `HeadReading`."""
    return BLOCKS[key].title if key in BLOCKS else DIALECTS[key].title


def dialect_of(hf: Mapping[str, Any], tensor_names: Collection[str]) -> str:
    """Returns the first dialect that a config.json or the tensor names show."""
    stated = {name for _, fields in _places(hf) for name in fields}
    listed = [fields.get("architectures") for _, fields in _places(hf)]
    named = {str(name) for names_of in listed if isinstance(names_of, list) for name in names_of}
    for key, dialect in DIALECTS.items():
        if named.intersection(dialect.architectures) or stated.intersection(dialect.marks):
            return key
        if dialect.tensors is not None and any(re.fullmatch(dialect.tensors, name) for name in tensor_names):
            return key
    return "official"


def refuse_unknown_fields(hf: Mapping[str, Any], dialect: HeadDialect, where: str, ignored: Collection[str]) -> None:
    """Raises ConfigError for a field that states something and is not known, at any place."""
    known = KNOWN.union(dialect.harmless, dialect.fields, dialect.marks, ignored)
    for place, fields in _places(hf):
        for name, value in fields.items():
            if name not in known and not name.startswith("_") and says_something(value):
                raise ConfigError(
                    f"{where}: {place}{name} = {value!r} is not known, and could change what the head computes; "
                    f"remove it if it does not, or name it in HeadChoices(ignored=...) (convert --ignore-field {name})"
                )


def _refuse_choices(checkpoint: Checkpoint, choices: HeadChoices, *fields: str) -> None:
    """Raises ConfigError for a choice that heads of this kind do not have."""
    for name in fields:
        if getattr(choices, name) is not None:
            raise ConfigError(f"{checkpoint.folder}: has no {name} to choose; that is of heads of another kind")


def _places(hf: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield place, hf
    for name in PLACES:
        if isinstance(hf.get(name), Mapping):
            yield from _places(hf[name], f"{place}{name}.")


def _renamed(hf: Mapping[str, Any], dialect: HeadDialect) -> dict[str, Any]:
    """Gives the fields of a dialect the names that are read, at every place."""
    return {
        dialect.fields.get(name, name): _renamed(value, dialect)
        if name in PLACES and isinstance(value, Mapping)
        else value
        for name, value in hf.items()
    }


def _without(hf: Mapping[str, Any], dropped: Collection[str]) -> dict[str, Any]:
    return {
        name: _without(value, dropped) if name in PLACES and isinstance(value, Mapping) else value
        for name, value in hf.items()
        if name not in dropped
    }


def _one_layer(hf: Mapping[str, Any], dialect: HeadDialect, official: Collection[str]) -> dict[str, tuple[Any, str]]:
    """Counts layers by the tensors where num_hidden_layers may be the target's."""
    more = any(re.match(r"layers\.[1-9]\d*\.", name) for name in official)
    if not dialect.layers_of_target or more or hf.get(LAYERS) in (None, 1):
        return {}
    return {LAYERS: (1, f"the tensors are of one layer, {LAYERS} {hf[LAYERS]} is the target's")}


def _layer(hf: Mapping[str, Any], dialect: HeadDialect) -> dict[str, tuple[Any, str]]:
    """Describes a layer of another architecture as a Llama layer with more parts."""
    for named in _stated(hf, MODEL_TYPE):
        parts = dialect.layer.get(str(named), dialect.layer.get("*"))
        if named != LLAMA and parts is not None:
            reason = f"{dialect.title} means a layer of {named}" if parts else f"{named!r} is the target's"
            return {name: (value, reason) for name, value in ({**parts, MODEL_TYPE: LLAMA}).items()}
    return {}


def _norms(hf: Mapping[str, Any], dialect: HeadDialect, official: Collection[str]) -> dict[str, tuple[Any, str]]:
    """Finds the norms of an EAGLE-1 head, and the bias of its fc, by the tensors where config.json does not state them.

    A statement is left as it is, so that a tensor which contradicts it has no place, or is missing.
    """
    if not dialect.norms:
        return {}
    spellings = flat_config.SPELLINGS | flat_config.SPELLINGS_OF_KIND["eagle1"]
    stated = {spellings.get(name, name) for _, fields in _places(hf) for name in fields if fields[name] is not None}
    parts = {name: NORMS[name] for name in dialect.norms} | {"bias": (names.EAGLE1["fc_bias"],)}
    return {
        name: (there, f"the file has {'such a tensor' if there else 'no such tensor'}")
        for name, wanted in parts.items()
        if name not in stated and ((there := any(one in official for one in wanted)) or name == "bias")
    }


def _frequent(hf: Mapping[str, Any], checkpoint: Checkpoint, where: str) -> dict[str, tuple[Any, str]]:
    """Sizes the vocabulary of an EAGLE-1 head by its table of frequent tokens."""
    faults = [checkpoint.faults[name] for name in names.TABLES if name in checkpoint.faults]
    if faults:
        raise CheckpointError(faults[0])
    table = checkpoint.tensors.get(names.DRAFT_TO_TARGET)
    if table is not None:
        if len(table.shape) != 1:
            raise CheckpointError(f"{table.where} has shape {table.shape}, a list of token ids was expected")
        return {DRAFT_VOCABULARY: (table.shape[0], f"{table.name} lists the tokens that the head drafts")}
    sizes = _stated(hf, "vocab_size")
    truncated = [size for size in _stated(hf, "truncated_vocab_size") if size not in sizes]
    if truncated:
        raise ConfigError(
            f"{where}: truncated_vocab_size = {truncated[0]!r} limits the head to tokens of which the file has no "
            "table; name one with HeadChoices(token_map=...) (eagle-jax convert --token-map)"
        )
    if any(size not in sizes for size in _stated(hf, DRAFT_VOCABULARY)):
        return {DRAFT_VOCABULARY: (sizes[0] if sizes else None, "all tokens, as no table lists some (--token-map)")}
    return {}


def _flags(hf: Mapping[str, Any], dialect: HeadDialect, where: str, choices: HeadChoices) -> dict[str, tuple[Any, str]]:
    """Settles norm_output and norm_before_residual of an EAGLE-3 head."""
    found: dict[str, tuple[Any, str]] = {}
    for name in (NORM_OUTPUT, NORM_BEFORE_RESIDUAL):
        if getattr(choices, name) is not None:
            found[name] = getattr(choices, name), "as chosen"
    left_open = leaves_open(hf, dialect, choices)
    if NORM_OUTPUT in left_open:
        raise ConfigError(
            f"{where}: {NORM_OUTPUT} = True means EAGLE-3.1 in engines (the next step reads the hidden state after the "
            "final norm), but SpecForge wrote it into plain EAGLE-3 heads (before the norm) for some months of 2026. "
            f"Choose with HeadChoices({NORM_OUTPUT}=False) or True (eagle-jax convert --norm-output)"
        )
    if NORM_BEFORE_RESIDUAL in left_open:
        raise ConfigError(
            f"{where}: {NORM_BEFORE_RESIDUAL} is missing; take it from the configuration of the head's training. "
            f"speculators means false by that, vLLM true. Choose with HeadChoices({NORM_BEFORE_RESIDUAL}=False) or "
            "True (eagle-jax convert --norm-before-residual)"
        )
    if NORM_OUTPUT not in found and True in _stated(hf, NORM_OUTPUT):
        found[NORM_OUTPUT] = True, "EAGLE-3.1: the next step reads the hidden state after the final norm"
    return found


def _depths(hf: Mapping[str, Any], where: str, choices: HeadChoices) -> dict[str, tuple[Any, str]]:
    """Settles the number of depths and the mask token of a P-EAGLE head, where its config.json does not state them."""
    masks = [name for name, field in SPELLINGS_OF_KIND["peagle"].items() if field == MASK_TOKEN]
    tokens = [tokens for tokens in speculative_tokens(hf).values() if tokens is not None]
    found: dict[str, tuple[Any, str]] = {}
    for name, stated, chosen, option, what in (
        (NUM_DEPTHS, _stated(hf, NUM_DEPTHS) + tokens, choices.num_depths, NUM_DEPTHS, "how many tokens a pass drafts"),
        (
            MASK_TOKEN,
            _stated(hf, MASK_TOKEN, *masks),
            choices.mask_token,
            "mask_token",
            "which token stands for one to predict",
        ),
    ):
        if chosen is not None:
            found[name] = chosen, "as chosen"
        elif not stated:
            raise ConfigError(
                f"{where}: {name} is missing, {what}; take it from the configuration of the head's training. Choose it "
                f"with HeadChoices({option}=...) (eagle-jax convert --{option.replace('_', '-')})"
            )
    return found


def leaves_open(hf: Mapping[str, Any], dialect: HeadDialect, choices: HeadChoices) -> set[str]:
    """Returns which of norm_output and norm_before_residual has two meanings in an EAGLE-3 head's config.json."""
    found = {name for name in dialect.required if getattr(choices, name) is None and not _stated(hf, name)}
    if choices.norm_output is None and True in _stated(hf, NORM_OUTPUT):
        found |= set() if dialect.norm_output or hf.get(OUR_NORM_OUTPUT) is True else {NORM_OUTPUT}
    return found


def _stated(hf: Mapping[str, Any], *spellings: str) -> list[Any]:
    """Returns the values of a field at all places, under any of its names."""
    return [fields[name] for _, fields in _places(hf) for name in spellings if fields.get(name) is not None]


def _taps(
    hf: Mapping[str, Any], dialect: HeadDialect, where: str, choices: HeadChoices, num_layers: int | None
) -> dict[str, tuple[Any, str]]:
    read = read_taps(hf, dialect, where, num_layers, choices.taps)
    layers = read.inputs
    if layers is None and num_layers is not None:
        layers = tap_layers(None, num_layers)
    named = "the official layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    inputs = None if read.inputs is None else list(read.inputs)
    return {TAPS: (inputs, f"the inputs of {named} are read; {read.because}")}
