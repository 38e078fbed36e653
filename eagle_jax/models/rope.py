"""Rotary position embedding: its config, the angles at each position, and the rotation of queries and keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.models.fields import ConfigError, flag, positive, require_equal

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Fields of a scaling that `RopeConfig` reads, or that change nothing.
SETTINGS = (
    *("rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("truncate", "attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor"),
    *("original_max_position_embeddings", "max_position_embeddings", "partial_rotary_factor", "finetuned"),
)

Rotation = tuple[Float32[Array, "batch new 1 half"], Float32[Array, "batch new 1 half"]]  # cos, sin; half of head_dim


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base and its scaling.

    theta: the base. kind: one of ROPE_KINDS.
    factor: read by linear, dynamic, llama3 and yarn.
    low_freq_factor, high_freq_factor: read by llama3.
    original_length: in tokens. For llama3 and yarn the pretraining length; dynamic scales the base of longer texts, and
      longrope has other factors for them.
    beta_fast, beta_slow: rotations over `original_length` between which yarn interpolates; truncate: whether it rounds
      their dimensions outwards.
    attention_factor: of cos and sin, hence its square of the scores. Read by yarn and longrope.
    short_factors, long_factors: divisors of the frequencies [head_dim / 2], read by longrope.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0
    _: dataclasses.KW_ONLY
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on the text's length, so that cached keys depend on the prompt's length."""
        return self.kind in ("dynamic", "longrope")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], max_position_embeddings: int, where: str) -> RopeConfig:
        """Reads `rope_theta` with `rope_scaling`, or `rope_parameters`. If both are stated, they must agree."""
        stated = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
        for name, settings in stated.items():
            if not isinstance(settings, Mapping):
                raise ConfigError(f"{where}: {name} must be an object, got {settings!r}")
        bases = {"rope_theta": hf.get("rope_theta")}
        bases |= {f"{name}.rope_theta": settings.get("rope_theta") for name, settings in stated.items()}
        base = require_equal({name: value for name, value in bases.items() if value is not None}, where)
        theta = positive("rope_theta", 10000.0 if base is None else base, where)

        original = hf.get("original_max_position_embeddings")
        ropes = {
            name: _scaled(theta, settings, original, max_position_embeddings, where)
            for name, settings in stated.items()
            if settings.keys() - {"rope_theta"}
        }
        return require_equal(ropes, where) or cls(theta)


def _scaled(theta: float, settings: Mapping[str, Any], original: Any, max_positions: int, where: str) -> RopeConfig:
    """Reads a rope_scaling; `original` is original_max_position_embeddings at the config's top level, or None."""
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise ConfigError(f"{where}: RoPE settings per layer type ({sorted(settings)}) are not implemented")
    kinds = {name: settings[name] for name in ("rope_type", "type") if settings.get(name) is not None}
    kind = require_equal(kinds, f"{where}: RoPE settings") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"{where}: rope type {kind!r} is not implemented; known: {', '.join(ROPE_KINDS)}")
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"{where}: partial_rotary_factor {settings['partial_rotary_factor']!r} is not implemented")
    where = f"{where}: rope type {kind!r}"

    def need(name: str, default: float | None = None) -> float:
        value = settings.get(name)
        return positive(name, default if value is None else value, where)

    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=need("factor"))
    if kind == "dynamic":
        return RopeConfig(theta, kind, factor=need("factor"), original_length=max_positions)
    original = original or settings.get("original_max_position_embeddings") or max_positions
    length = int(positive("original_max_position_embeddings", original, where))
    if kind == "llama3":
        low, high = need("low_freq_factor"), need("high_freq_factor")
        if not low < high:
            raise ConfigError(f"{where}: low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeConfig(theta, kind, need("factor"), low, high, length)
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]} = {settings[unknown[0]]!r} is not implemented")
    factor = need("factor", max_positions / length)
    if kind == "longrope":
        short, long = (_factors(name, settings.get(name), where) for name in ("short_factor", "long_factor"))
        growth = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        return RopeConfig(
            theta,
            kind,
            original_length=length,
            attention_factor=need("attention_factor", growth),
            short_factors=short,
            long_factors=long,
        )
    return RopeConfig(
        theta,
        kind,
        factor,
        original_length=length,
        beta_fast=need("beta_fast", 32.0),
        beta_slow=need("beta_slow", 1.0),
        truncate=flag(settings, "truncate", where, default=True),
        attention_factor=need("attention_factor", _yarn_attention(factor, settings)),
    )


def _factors(name: str, value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{where}: {name} must list a number for each frequency, got {value!r}")
    return tuple(positive(name, number, where) for number in value)


def _yarn_attention(factor: float, settings: Mapping[str, Any]) -> float:
    """Returns YaRN's factor of cos and sin where the config states none (arXiv 2309.00071, section 3.4)."""
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    scale, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    return (1 + growth * scale) / (1 + growth * all_dims) if scale and all_dims else 1 + growth


def rope_frequencies(rope: RopeConfig, head_dim: int, longer: bool = False) -> Float32[np.ndarray, " half"]:
    """Returns inverse frequencies, scaled except for dynamic scaling, which `rope_angles` applies.

    Args:
      longer: those of a text longer than `original_length`; longrope alone tells them apart.
    Raises:
      ConfigError: if longrope has another number of factors than frequencies.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "longrope":
        factors = np.array(rope.long_factors if longer else rope.short_factors, np.float32)
        if factors.shape != frequencies.shape:
            raise ConfigError(f"longrope has {len(factors)} factors for the {len(frequencies)} frequencies of a head")
        return frequencies / factors
    if rope.kind == "llama3":
        # Long wavelengths are divided by `factor`, short ones unchanged, those between interpolated.
        wavelength = 2 * np.pi / frequencies
        blend = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
    elif rope.kind == "yarn":
        blend = _yarn_blend(rope, head_dim)
    else:
        return frequencies
    return ((1 - blend) * frequencies / rope.factor + blend * frequencies).astype(np.float32)


def _yarn_blend(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, " half"]:
    """Returns 1 for frequencies that YaRN keeps, 0 for those it divides by `factor`, and a ramp between."""

    def dimension(rotations: float) -> float:
        """Returns the (fractional) index of the frequency with so many rotations over `original_length`."""
        turns = math.log(rope.original_length / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0.0
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first)
    return (1 - np.clip(ramp, 0.0, 1.0)).astype(np.float32)


@jax.named_scope("rope")
def rope_angles(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "batch new"],
    prompt_lengths: Int[Array, " batch"] | Int[Array, "batch new"],
) -> Rotation:
    """Returns cos and sin of the rotation at each position, times the attention factor.

    Args:
      prompt_lengths: of each sequence, or of each token for packed documents. Read by dynamic scaling and longrope
        only, which depend on the text's length. For a prompt's tokens that is the prompt's length; for a later token,
        its position + 1. Step-by-step decoding computes the same, so a pass over a tree agrees with single steps.
    """
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    positions = positions[:, :, None, None]
    if rope.by_length:
        own_lengths = prompt_lengths.reshape(len(prompt_lengths), -1, 1, 1)
        text_length = jnp.maximum(positions + 1, own_lengths)
    if rope.kind == "dynamic":
        text_length = jnp.maximum(text_length.astype(jnp.float32), rope.original_length)
        stretch = rope.factor * text_length / rope.original_length - (rope.factor - 1)
        base = rope.theta * stretch ** (head_dim / (head_dim - 2))
        exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / base ** exponent[None, None, None, :]
    else:
        frequencies = frequencies[None, None, None, :]
    if rope.kind == "longrope":
        longer = jnp.asarray(rope_frequencies(rope, head_dim, longer=True))[None, None, None, :]
        frequencies = jnp.where(text_length > rope.original_length, longer, frequencies)
    angles = positions.astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1 else (cos * rope.attention_factor, sin * rope.attention_factor)


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "batch new heads head_dim"],
    cos: Float32[Array, "batch new 1 half"],
    sin: Float32[Array, "batch new 1 half"],
) -> Float[Array, "batch new heads head_dim"]:
    """Applies rotary embedding in float32; the first half of head_dim pairs with the second.

    [a, b] -> [a cos - b sin, b cos + a sin]. Swaps the halves by a reversal, which XLA:CPU fuses into the products; it
    would not fuse a concatenation.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    signed_sin = jnp.stack([-sin, sin], axis=-2)
    rotated = halves * cos[..., None, :] + jnp.flip(halves, axis=-2) * signed_sin
    return rotated.reshape(x.shape).astype(x.dtype)
