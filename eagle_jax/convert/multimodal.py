"""Takes the text part of a multimodal checkpoint: its config and its tensors, under the names of a text model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import CONFIG, Checkpoint
from eagle_jax.models.architectures import MULTIMODAL, text_config

# Files have `language_model.model.*` and `language_model.lm_head`, or `model.language_model.*` and `lm_head`.
TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
VISION = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..+")
LM_HEAD = "lm_head."


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the text part of a multimodal checkpoint, without its vision tensors; any other as it is.

    Raises:
      CheckpointError: if two tensors have one name in the text part.
      ConfigError: see `text_config`.
    """
    present = sorted(checkpoint.tensors.keys() | checkpoint.faults.keys())
    if checkpoint.config.get("model_type") not in list(MULTIMODAL) or not any(map(TEXT.fullmatch, present)):
        return checkpoint
    config = dict(text_config(checkpoint.config, str(checkpoint.config_path)))
    names = _text_names(present, checkpoint)
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors={ours: checkpoint.tensors[name] for ours, name in names.items() if name in checkpoint.tensors},
        faults={ours: checkpoint.faults[name] for ours, name in names.items() if name in checkpoint.faults},
        made={CONFIG: (json.dumps(config, indent=2) + "\n").encode()},
    )


def _text_names(present: Collection[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Returns {name in a text model: name in the file}; a tensor that is neither text nor vision keeps its name."""
    names: dict[str, str] = {}
    for name in present:
        if VISION.fullmatch(name):
            continue
        match = TEXT.fullmatch(name)
        ours = name if match is None else match[1] if match[1].startswith(LM_HEAD) else f"model.{match[1]}"
        if ours in names:
            raise CheckpointError(
                f"{checkpoint.folder}: {names[ours]!r} and {name!r} stand for the same tensor; remove one of them"
            )
        names[ours] = name
    return names
