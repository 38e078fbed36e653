"""Plans the export of a head that drafts blocks (DFlash, DSpark): what its files hold, and why a format cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

from eagle_jax.convert import names
from eagle_jax.convert.block_engines import BLOCK_ENGINES, FEATURES, BlockEngine
from eagle_jax.convert.heads.blocks import BLOCKS
from eagle_jax.convert.heads.rules import theirs_of
from eagle_jax.convert.match import output_path
from eagle_jax.convert.official import to_official
from eagle_jax.convert.plans import Plan, is_targets, speculators_config, target_rows
from eagle_jax.drafts.dflash import FROM_ROOT, INPUTS, OUTPUTS, OWN, SOME, TWO_WAYS, DFlash, DFlashConfig
from eagle_jax.drafts.dspark import DSpark, DSparkConfig
from eagle_jax.models.config import ConfigError
from eagle_jax.models.llama import Llama
from eagle_jax.models.target import logit_softcap

BORROWED = ("embed", "lm_head")


def plan_block(draft: DFlash, target: Llama, format: str) -> Plan:
    """Plans the export of a head in a format; see `engine_plan.plan`."""
    check_block(draft, target, format)
    kind, engine = _kind(draft), BLOCK_ENGINES[format][_kind(draft)]
    dialect, config = BLOCKS[engine.dialect], draft.config
    added = {path: target_rows(target, _of_target(path, target)) for path in needed_by_block(draft, format)}
    dropped = tuple(path for path in BORROWED if _own(draft)[path] and path not in engine.needs)
    notes = [
        f"{names.DFLASH[path]} was added, the target's: {engine.title} takes none from the target" for path in added
    ]
    notes += [f"{names.DFLASH[path]} was left out, a copy of the target's" for path in dropped]
    held: dict[str, Any] = {
        f"own_{name}": path in engine.needs for path, name in zip(BORROWED, ("embedding", "lm_head"), strict=True)
    }
    expected = dataclasses.replace(config, **held)
    if isinstance(expected, DSparkConfig):
        expected = dataclasses.replace(expected, confidence_threshold=0.0)
    if dialect.inputs:
        expected = dataclasses.replace(expected, num_target_layers=0)
    table = names.DFLASH
    arrays = to_official(draft) | {table[path]: array for path, array in added.items()}
    tensors = {
        theirs_of(name, dialect.rules): array
        for name, array in arrays.items()
        if name not in {table[path] for path in dropped}
    }
    notes += [engine.note] if engine.note else []
    config_json = _config_json(expected, kind, engine)
    return Plan(kind, "model.safetensors", tensors, config_json, expected, added, tuple(notes), dropped)


def needed_by_block(draft: DFlash, format: str) -> tuple[str, ...]:
    """Returns what an export takes of the target's weights: "embed" or "lm_head"."""
    engine = BLOCK_ENGINES.get(format, {}).get(_kind(draft))
    return () if engine is None else tuple(path for path in engine.needs if not _own(draft)[path])


def check_block(draft: DFlash, target: Llama, format: str) -> None:
    """Raises the ConfigError of `plan_block`. Both models may be abstract."""
    draft.check_fits(target)
    kind = _kind(draft)
    if format not in BLOCK_ENGINES:
        raise ConfigError(f"format {format} has no place for a {type(draft).__name__} head ({_fix(draft, target)})")
    reasons = _refusals(draft, target, format)
    if reasons:
        title = BLOCK_ENGINES[format][kind].title
        raise ConfigError(f"{title} cannot run this head: {'; '.join(reasons)} ({_fix(draft, target)})")
    draft.config.require_stated(draft.config.layer_fields() | draft.config.own_fields())


def _refusals(draft: DFlash, target: Llama, format: str) -> list[str]:
    """Returns the reasons why a reader would not run this head as it was trained; empty if it would."""
    engine, config = BLOCK_ENGINES[format][_kind(draft)], draft.config
    found = [words for part, (has, words) in FEATURES.items() if part in engine.lacks and has(config)]
    if max(config.taps) >= target.config.num_layers:
        found.append(f"it taps the output of the last layer ({list(config.taps)}), which readers take after a norm")
    for path, own in _own(draft).items():
        if own and path not in engine.needs and not is_targets(draft, path, target, _of_target(path, target)):
            found.append(f"{names.DFLASH[path]} is its own, the format's heads use the target's")
    if logit_softcap(target) is not None and "lm_head" in needed_by_block(draft, format):
        found.append("the target caps its logits, the file's copy of its lm_head has no cap")
    return found


def _fix(draft: DFlash, target: Llama) -> str:
    others = [name for name in BLOCK_ENGINES if not _refusals(draft, target, name)]
    return f"formats that can hold it: {', '.join(others)}" if others else "no other format can hold it either"


def _kind(draft: DFlash) -> str:
    return "dspark" if isinstance(draft, DSpark) else "dflash"


def _own(draft: DFlash) -> dict[str, bool]:
    """Returns, by the paths of BORROWED, which of them the head has."""
    return {"embed": draft.config.own_embedding, "lm_head": draft.config.own_lm_head}


def _of_target(path: str, target: Llama) -> str:
    return output_path(target) if path == "lm_head" else path


def _config_json(config: DFlashConfig, kind: str, engine: BlockEngine) -> dict[str, Any]:
    """Returns the config.json of a head whose config already has the form that reading back gives."""
    if engine.own_form:
        return config.to_hf()
    dialect = BLOCKS[engine.dialect]
    own, layer = config.own_fields(), config.layer_fields()
    head: dict[str, Any] = {"architectures": [engine.architecture]}
    if dialect.inputs:  # speculators states all of these
        for name in (OUTPUTS, "causal"):
            own.pop(name, None)
        own |= {INPUTS: list(config.taps), SOME: config.draft_vocab_size or config.vocab_size}
        own |= {TWO_WAYS: not config.causal_windows, FROM_ROOT: config.from_root}
        return head | speculators_config(kind, config.deepest) | {dialect.layer: layer} | own
    if FROM_ROOT in dialect.nested:
        own[FROM_ROOT] = config.from_root
    spelled = {field: spelling for spelling, field in dialect.fields.items()}
    nested = {spelled.get(name, name): own[name] for name in dialect.nested if name in own}
    top = {name: value for name, value in own.items() if name not in dialect.nested or name in dialect.twice}
    if nested or engine.nested:
        top[OWN] = nested | dict(engine.nested)
    if "attention_mode" in dialect.harmless:
        top[OWN]["attention_mode"] = "mha" if config.num_heads == config.num_kv_heads else "gqa"
    return head | layer | top | dict(engine.fields)
