"""Spec: the attention of one layer, that is window, sinks, softcap and scale. Every backend of attention reads it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("sinks",), meta_fields=("window", "first", "softcap", "scale")
)
@dataclasses.dataclass(frozen=True)
class Spec:
    """What the queries of a layer see, and how its scores are made. The default is Llama's, and None costs nothing.

    window: sliding window; a query sees its own position and the `window` - 1 before it. None: all positions before it.
    first: with a window, positions below `first` stay visible to every query (attention sinks of arXiv 2309.17453).
    sinks: a logit for each query head that enters the softmax and has no value (gpt-oss).
    softcap: replaces a score by softcap * tanh(score / softcap), before the mask (Gemma 2).
    scale: factor on q k'. None: head_dim ** -0.5.
    """

    window: int | None = None
    first: int = 0
    sinks: Float[Array, " heads"] | None = None
    softcap: float | None = None
    scale: float | None = None

    @property
    def plain(self) -> bool:
        """Whether this is Llama's attention: full, without sinks or softcap, scaled by head_dim ** -0.5."""
        return self.window is None and self.sinks is None and self.softcap is None and self.scale is None

    def sees(
        self, queries: Int[Array, "#batch new 1"], keys: Int[Array, "#batch #new kv"]
    ) -> Bool[Array, "batch new kv"]:
        """Returns whether a query position sees a key position through the window.

        Ignores causality: later keys are the mask's business.
        """
        assert self.window is not None
        return (keys < self.first) | (keys >= queries - self.window + 1)

    def scale_of(self, head_dim: int) -> float:
        """Returns the factor on q k' for this head dim."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def scores(self, products: Float32[Array, "*queries kv"], head_dim: int) -> Float32[Array, "*queries kv"]:
        """Turns products q k' into scores, before the mask."""
        return capped(products * self.scale_of(head_dim), self.softcap)


def capped(values: Float[Array, "*axes"], softcap: float | Float[Array, ""] | None) -> Float[Array, "*axes"]:
    """Returns softcap * tanh(values / softcap), between -softcap and softcap; None: the values."""
    return values if softcap is None else softcap * jnp.tanh(values / softcap)


PLAIN = Spec()
