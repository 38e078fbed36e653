"""Spec: which older positions a layer's queries see, and how scores are made from q and k."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("sinks",), meta_fields=("window", "first", "softcap", "scale")
)
@dataclasses.dataclass(frozen=True)
class Spec:
    """The attention of one layer. The default is that of Llama; whatever is None costs nothing.

    window: a query sees its own position and the `window` - 1 before it (a sliding window). None: all before it.
    first: the text's first positions, so many, are seen from outside the window, too (arXiv 2309.17453).
    sinks: [N], a logit for each query head that takes part in the softmax and has no value (gpt-oss).
    softcap: scores become softcap * tanh(score / softcap), before the mask (Gemma 2).
    scale: the factor on q k'. None: H ** -0.5.
    """

    window: int | None = None
    first: int = 0
    sinks: jax.Array | None = None
    softcap: float | None = None
    scale: float | None = None

    @property
    def plain(self) -> bool:
        """Whether this is Llama's attention."""
        return self.window is None and self.sinks is None and self.softcap is None and self.scale is None

    def sees(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Marks which key positions the window shows to which query positions; their shapes broadcast."""
        assert self.window is not None
        return (keys < self.first) | (keys >= queries - self.window + 1)

    def scale_of(self, head_dim: int) -> float:
        """The factor on q k' of heads of this width."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def scores(self, products: jax.Array, head_dim: int) -> jax.Array:
        """Scores before the mask from the products q k' of heads of this width."""
        scores = products * self.scale_of(head_dim)
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


PLAIN = Spec()
