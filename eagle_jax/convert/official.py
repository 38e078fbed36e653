"""Returns a model, or its gradient, under the official tensor names."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from eagle_jax.convert import experts, names
from eagle_jax.convert.dialects import DIALECTS
from eagle_jax.convert.vocabulary import official_tables
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.protocol import Draft
from eagle_jax.drafts.registry import CLASSES
from eagle_jax.models import params
from eagle_jax.models.llama import Llama
from eagle_jax.models.target import Target

# {class: kind}; a DraftModel is written as its Llama.
KINDS: dict[type, str] = {Llama: "llama", **{CLASSES[kind]: kind for kind in DIALECTS}}


def to_official(model: Target | Draft) -> dict[str, np.ndarray]:
    """Returns {official tensor name: array} with official shapes, in the model's dtypes.

    Args:
      model: a model, or a gradient of it (a pytree of the same class). An EAGLE-3 head also gives `d2t` int64 and `t2d`
        bool, trivial ones if it has the target's vocabulary. A gradient does not: its integer table is of JAX's
        float0. An EAGLE-1 head of frequent tokens gives its tables, without the rows, which are the target's. A
        DraftModel gives the tensors of its Llama.
    Raises:
      TypeError: for a draft without weights, or an object that no checkpoint can hold.
    """
    if isinstance(model, DraftModel):
        return to_official(model.model)
    kind = next((kind for cls, kind in KINDS.items() if isinstance(model, cls)), None)
    if kind is None:
        raise TypeError(f"expected one of {', '.join(cls.__name__ for cls in KINDS)}, not {type(model).__name__}")
    dialect = DIALECTS[kind]
    table = dialect.official(model)
    leaves: dict[str, Any] = params.flatten(model)
    ids = leaves.pop("target_ids", None)
    leaves.pop(dialect.of_target, None)
    arrays = {}
    for path, leaf in leaves.items():
        array = np.asarray(leaf)
        arrays[names.official_name(table, path)] = array.reshape(names.official_shape(path, array.shape))
    if dialect.vocabulary:
        config: Any = getattr(model, "config", None)
        # Official EAGLE-3 files have trivial tables, too.
        trivial = dialect.trivial_tables and config.draft_vocab_size == config.vocab_size
        # The table of a gradient is float0 or absent.
        if trivial or (ids is not None and ids.dtype != jax.dtypes.float0):
            d2t, t2d = official_tables(ids, config.vocab_size)
            arrays |= {names.DRAFT_TO_TARGET: d2t, names.TARGET_TO_DRAFT: t2d}
    return experts.pack(arrays)
