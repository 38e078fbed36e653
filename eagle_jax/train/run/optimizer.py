"""Builds the Optax optimizer of a run from its settings."""

from __future__ import annotations

from typing import Any

import optax

from eagle_jax.train.config import OptimizerSettings
from eagle_jax.train.run.step import Arrays


def schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Returns the schedule of the learning rate, as a fraction of its peak."""
    warmup, last = settings.warmup_steps, settings.decay_steps or steps
    decay = max(last - warmup, 1)
    final = settings.final_fraction
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, final, decay),
        "cosine": optax.cosine_decay_schedule(1.0, decay, final),
        "trapezoid": optax.linear_schedule(1.0, final, max(decay // 5, 1), decay - max(decay // 5, 1)),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(1 / max(warmup, 1), 1.0, max(warmup - 1, 1)), after], [warmup])


def optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Returns clipping, then AdamW or Muon, over {path: array}. AdamW decays matrices only."""
    shape = schedule(settings, steps)

    def rate(peak: float) -> optax.Schedule:
        return lambda step: peak * shape(step)

    def decayed(masters: Arrays) -> dict[str, bool]:
        return {path: array.ndim > 1 for path, array in masters.items()}

    peak, (b1, b2) = settings.learning_rate, settings.betas
    if settings.name == "adamw":
        update = optax.adamw(rate(peak), b1, b2, weight_decay=settings.weight_decay, mask=decayed)
    else:
        update = optax.contrib.muon(
            rate(peak),
            weight_decay=settings.weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=rate(settings.adam_learning_rate or peak),
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    clips = []
    if settings.clip_value is not None:
        clips.append(optax.clip(settings.clip_value))
    if settings.clip_norm is not None:
        clips.append(optax.clip_by_global_norm(settings.clip_norm))
    return optax.chain(*clips, update)


def _matrices(masters: Arrays) -> dict[str, Any]:
    """Returns how Muon sees the layers' matrices, [out, in] or [heads, head dim, in]; None: Adam's part."""
    dims = {2: optax.contrib.MuonDimensionNumbers((1,), (0,)), 3: optax.contrib.MuonDimensionNumbers((2,), (0, 1))}
    outside = ("embed", "lm_head", "mask_hidden")

    def of(path: str, array: Any) -> Any:  # Muon also calls this with masked leaves, which have no ndim
        return None if path in outside or "bias" in path else dims.get(getattr(array, "ndim", 0))

    return {path: of(path, array) for path, array in masters.items()}
