"""to_official: a model, or its gradient, under the official tensor names."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from eagle_jax.convert import names
from eagle_jax.convert.vocabulary import official_tables
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.medusa import Medusa
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models import params
from eagle_jax.models.llama import Llama
from eagle_jax.models.target import Target

TABLES: dict[type, dict[str, str]] = {Llama: names.LLAMA, Eagle3Draft: names.EAGLE3, Eagle1Draft: names.EAGLE1}


def to_official(model: Target | Draft) -> dict[str, np.ndarray]:
    """{official tensor name: array} with official shapes, in the model's dtypes.

    Args:
      model: a model, or a gradient of it (a pytree of the same class). An EAGLE-3 head comes with `d2t` int64
        and `t2d` bool, trivial ones where both vocabularies are one; a gradient, whose integer table is of
        JAX's float0, comes without. A DraftModel gives what its Llama does.
    Raises:
      TypeError: for a draft without weights, or anything else that no checkpoint holds.
    """
    if isinstance(model, DraftModel):
        return to_official(model.model)
    if isinstance(model, Medusa):
        table = names.medusa_names(model.config.num_heads, model.config.num_blocks)
    elif type(model) in TABLES:
        table = TABLES[type(model)]
    else:
        known = ", ".join(cls.__name__ for cls in (*TABLES, Medusa, DraftModel))
        raise TypeError(f"expected one of {known}, not {type(model).__name__}")
    leaves: dict[str, Any] = params.flatten(model)
    ids = leaves.pop("target_ids", None)
    arrays = {}
    for path, leaf in leaves.items():
        array = np.asarray(leaf)
        arrays[names.official_name(table, path)] = array.reshape(names.official_shape(path, array.shape))
    if isinstance(model, Eagle3Draft):
        has_table = model.config.draft_vocab_size != model.config.vocab_size
        # A gradient's table is float0, or was left out.
        if not has_table or (ids is not None and ids.dtype != jax.dtypes.float0):
            d2t, t2d = official_tables(ids, model.config.vocab_size)
            arrays |= {names.DRAFT_TO_TARGET: d2t, names.TARGET_TO_DRAFT: t2d}
    return arrays
