"""Sampling: from the target's logits to the distribution of the next token.

The order is Hugging Face's: logit bias, repetition penalty, temperature, top-k, top-p, min-p. All numbers are data, one
for the batch or one a sequence: changing them never recompiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Num

from eagle_jax.tree.accept import argmax

__all__ = ["SamplingConfig", "probabilities", "process", "warp"]

# The valid range of each number: a test, and a description.
RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "temperature": (lambda x: (x >= 0) & (x < math.inf), "0 (greedy) or a finite number above it"),
    "top_k": (lambda x: (x >= 0) & (x == x // 1), "a whole number: 0 (off) or the number of tokens to keep"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0, and at most 1 (off)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "0 (off) to 1"),
    "repetition_penalty": (lambda x: (x > 0) & (x < math.inf), "a finite number above 0; 1 is off"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Sampling parameters, as in `transformers.generate`. A pytree whose fields are one number, or [batch].

    temperature: 0 is greedy: the token of the largest logit, the first on ties. A Python 0, without a penalty or bias,
      selects the greedy program, which computes no probabilities and needs no key. In an array, 0 makes that sequence
      of a mixed batch greedy.
    top_k: keep the k largest logits, and ties with the k-th; 0 keeps all.
    top_p: keep the smallest set of most probable tokens whose mass reaches top_p, and ties with the last; 1 keeps all.
    min_p: keep tokens at least min_p times as probable as the most probable one; 0 keeps all.
    repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the prompt, the new
      tokens, or a tree node's ancestors; 1 changes nothing.
    logit_bias: [vocab] or [batch, vocab], added to the logits; -inf masks a token. None for none.
    coupled: share the target's Gumbel noise with the draft (see `tree.accept_coupled`): the same distribution, with
      more draft tokens accepted. Static.

    Raises:
      ValueError: for a number outside its range.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    logit_bias: Any = None
    coupled: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        for name in RANGES:
            value = getattr(self, name)
            if isinstance(value, bool | int | float | str | list | tuple | np.ndarray | np.generic):
                _check_range(name, value)

    @property
    def greedy(self) -> bool:
        """Whether this selects the greedy program. Only Python numbers do, as the values of arrays are data."""
        return _is(self.temperature, 0) and _is(self.repetition_penalty, 1) and self.logit_bias is None

    def check(self, batch: int, vocab_size: int) -> None:
        """Raises ValueError for shapes that do not fit, and for concrete values outside their range."""
        for name in RANGES:
            value = getattr(self, name)
            if jnp.shape(value) not in ((), (batch,)):
                raise ValueError(f"sampling.{name} must be one number or [{batch}], one a row; got {jnp.shape(value)}")
            if not isinstance(value, jax.core.Tracer):
                _check_range(name, value)
        bias = self.logit_bias
        if bias is None:
            return
        if jnp.shape(bias) not in ((vocab_size,), (batch, vocab_size)):
            allowed = f"[{vocab_size}] or [{batch}, {vocab_size}]"
            raise ValueError(f"sampling.logit_bias must be {allowed}; got {jnp.shape(bias)}")
        if not isinstance(bias, jax.core.Tracer) and not (np.asarray(bias) < np.inf).all():
            raise ValueError("sampling.logit_bias must be finite, or -inf to forbid a token; it holds NaN or +inf")

    def rows(self, batch: int) -> SamplingConfig:
        """Broadcasts every field to the batch: [batch] float32 (top_k int32), the bias [batch, vocab]."""

        def row(value, dtype):
            return jnp.broadcast_to(jnp.asarray(value, dtype), (batch,))

        numbers = {name: row(getattr(self, name), jnp.int32 if name == "top_k" else jnp.float32) for name in RANGES}
        bias = self.logit_bias
        if bias is not None:
            bias = jnp.asarray(bias, jnp.float32)
            bias = jnp.broadcast_to(bias.reshape(-1, bias.shape[-1]), (batch, bias.shape[-1]))
        return SamplingConfig(**numbers, logit_bias=bias, coupled=self.coupled)


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and value == number


def _check_range(name: str, value: Any) -> None:
    inside, allowed = RANGES[name]
    values = np.asarray(value)
    good = np.asarray(inside(values)) if values.dtype.kind in "iuf" else np.zeros(values.shape, bool)
    if not good.all():
        where = "" if values.ndim == 0 else f"[{np.argmin(good)}]"
        raise ValueError(f"sampling.{name}{where} must be {allowed}; got {values[~good].ravel()[0].item()!r}")


def probabilities(
    logits: Float[Array, "*batch vocab"],
    sampling: SamplingConfig,
    seen: Bool[Array, "#*batch vocab"] | Callable[[], Bool[Array, "#*batch vocab"]] | None = None,
) -> Float32[Array, "*batch vocab"]:
    """Returns the distribution of the next token, the softmax of `process`."""
    return jax.nn.softmax(process(logits, sampling, seen), axis=-1)


def process(
    logits: Float[Array, "*batch vocab"],
    sampling: SamplingConfig,
    seen: Bool[Array, "#*batch vocab"] | Callable[[], Bool[Array, "#*batch vocab"]] | None = None,
) -> Float32[Array, "*batch vocab"]:
    """Returns logits whose softmax is the distribution of the next token: 0 and -inf at temperature 0.

    Args:
      logits: with the batch as the first axis if a field of `sampling` is [batch]; more axes may follow, such as nodes.
      seen: which tokens repetition_penalty applies to, or a function that returns it and is called only if a penalty is
        set; None for no token.
    Returns:
      The processed logits; NaN where logits are NaN or a bias masks every token.
    """
    logits = logits.astype(jnp.float32)
    if sampling.logit_bias is not None:
        bias = jnp.asarray(sampling.logit_bias, jnp.float32)
        between = (1,) * (logits.ndim - bias.ndim)
        logits = logits + bias.reshape(*bias.shape[:-1], *between, bias.shape[-1])
    if seen is not None:
        penalty = _beside(sampling.repetition_penalty, logits)
        make_seen = seen if callable(seen) else lambda: seen

        def penalized(x):
            return jnp.where(make_seen(), jnp.where(x < 0, x * penalty, x / penalty), x)

        logits = _if(jnp.any(penalty != 1), penalized, logits)
    return warp(logits, sampling)


def warp(logits: Float[Array, "*batch vocab"], sampling: SamplingConfig) -> Float[Array, "*batch vocab"]:
    """Applies temperature, top-k, top-p and min-p: the part of `process` that depends on the logits only."""
    temperature, top_k, top_p, min_p = (
        _beside(value, logits) for value in (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    )
    top = jnp.max(logits, axis=-1, keepdims=True)
    # Subtract the largest logit first, so that a small temperature cannot overflow.
    warm = (logits - top) / jnp.where(temperature > 0, temperature, 1.0)

    def keep_top_k(x):
        keep = _keep_mask(x, jnp.ones_like(x), jnp.maximum(top_k, 1).astype(jnp.float32))
        return jnp.where(keep | (top_k == 0), x, -jnp.inf)

    def keep_top_p(x):
        weights = jnp.exp(x)
        keep = _keep_mask(x, weights, top_p * weights.sum(axis=-1, keepdims=True))
        return jnp.where(keep | (top_p >= 1), x, -jnp.inf)

    warm = _if(jnp.any(top_k > 0), keep_top_k, warm)
    warm = _if(jnp.any(top_p < 1), keep_top_p, warm)
    warm = jnp.where(jnp.exp(warm) >= min_p, warm, -jnp.inf)  # the largest is exp(0) = 1
    cold = _one_hot_logits(logits, top)
    return jnp.where(temperature > 0, warm, cold)


def _one_hot_logits(
    logits: Float[Array, "*batch vocab"], top: Float[Array, "*batch 1"]
) -> Float[Array, "*batch vocab"]:
    """Returns 0 at the first largest logit and -inf elsewhere; NaN if no logit is finite."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    first = argmax(logits)[..., None]
    return jnp.where(jnp.isfinite(top), jnp.where(index == first, np.float32(0), -jnp.inf), jnp.nan)


def _keep_mask(
    values: Float32[Array, "*batch vocab"], weights: Float[Array, "*batch vocab"], limit: Float[Array, "#*batch 1"]
) -> Bool[Array, "*batch vocab"]:
    """Returns a mask of the values for which the weights of all strictly larger values sum to less than `limit`.

    With weights of 1 and a limit of k these are the k largest values; with probabilities and top_p, the nucleus.

    Instead of a sort, this bisects on the threshold's bits: floats compare like their bits as integers. It takes 32
    sums and no memory.

    Args:
      values: no NaN.
      weights: not negative.
      limit: above 0.
    """
    bits = jnp.where(values == 0, 0, jax.lax.bitcast_convert_type(values, jnp.int32))  # -0.0 is 0.0
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def halve(_, bounds):
        low, high = bounds  # enclose the smallest threshold that fits
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        fits = jnp.where(order > middle, weights, 0.0).sum(axis=-1, keepdims=True) < limit
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    ends = jnp.iinfo(jnp.int32)
    shape = (*values.shape[:-1], 1)
    bounds = jnp.full(shape, ends.min, jnp.int32), jnp.full(shape, ends.max, jnp.int32)
    return order >= jax.lax.fori_loop(0, 32, halve, bounds)[1]


def _beside(value: Any, logits: Float[Array, "*batch vocab"]) -> Num[Array, " ..."]:
    """Appends axes to a number or [batch] until it has the rank of the logits."""
    value = jnp.asarray(value)
    value = value.astype(jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else jnp.float32)
    return value.reshape(value.shape + (1,) * (logits.ndim - value.ndim))


def _if(
    condition: Bool[Array, ""],
    change: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]],
    x: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """Returns `change(x)` if the condition holds, else x, at run time and without the cost of `change`."""
    return jax.lax.cond(condition, change, lambda x: x, x)
