"""What every plan of an export holds, and what plans of several kinds of head share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from eagle_jax.models import params
from eagle_jax.models.config import ConfigError, LlamaConfig
from eagle_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the contents of an export.

    kind: of the head. file: the name of the file of weights. tensors: of this file, by the engine's names.
    config: the fields of config.json, except the dtype. expected: the config after reading back.
    added: {path: parameter} that the head itself lacks. dropped: paths of the head's copies of the target's weights,
      which are not written.
    notes: sentences for the user.
    """

    kind: str
    file: str
    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    expected: LlamaConfig
    added: dict[str, np.ndarray]
    notes: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def target_rows(target: Llama, path: str) -> np.ndarray:
    """Returns the target's embedding or output matrix [V, D].

    Raises:
      ConfigError: for an abstract target.
    """
    leaf = params.flatten(target)[path]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ConfigError(
            f"this head has no {path} of its own, and the target is abstract: load the target with its weights"
        )
    return np.asarray(leaf)


def is_targets(draft: Any, path: str, target: Llama, of_target: str) -> bool:
    """Returns whether a head's matrix, cast to the target's dtype, equals the target's. Unknown counts as no."""
    ours, theirs = params.flatten(draft)[path], params.flatten(target)[of_target]
    if isinstance(theirs, jax.ShapeDtypeStruct):
        return False
    return np.array_equal(np.asarray(ours).astype(theirs.dtype), np.asarray(theirs))


def speculators_config(kind: str, tokens: int) -> dict[str, Any]:
    """Returns what a config.json of speculators says beside the head and its layers; it names no target.

    Args:
      tokens: that it proposes at once.
    """
    verifier: dict[str, Any] = {"name_or_path": None, "architectures": []}
    return {
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": verifier,
        },
    }
