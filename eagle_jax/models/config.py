"""Model configurations: frozen, read from a Hugging Face `config.json`.

A field that would change the forward pass and is not implemented is refused by name. A config that loads is therefore
computed as written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.models.fields import (
    NEUTRAL_VALUES,
    ConfigError,
    flag,
    positive,
    refuse_unknown_mathematics,
    require_equal,
    size,
)
from eagle_jax.ops.spec import Spec

ROPE_KINDS = ("default", "linear", "dynamic", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base and its scaling.

    theta: the base. kind: one of ROPE_KINDS.
    factor: read by linear, dynamic and llama3.
    low_freq_factor, high_freq_factor: read by llama3.
    original_length: in tokens. For llama3 the pretraining length; dynamic scales the base of longer texts.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0

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
            name: cls._scaled(theta, settings, original, max_position_embeddings, where)
            for name, settings in stated.items()
            if settings.keys() - {"rope_theta"}
        }
        return require_equal(ropes, where) or cls(theta)

    @classmethod
    def _scaled(
        cls, theta: float, settings: Mapping[str, Any], original: Any, max_position_embeddings: int, where: str
    ) -> RopeConfig:
        """Reads a rope_scaling; `original` is original_max_position_embeddings at the config's top level, or None."""
        if any(isinstance(value, Mapping) for value in settings.values()):
            raise ConfigError(f"{where}: RoPE settings per layer type ({sorted(settings)}) are not implemented")
        kinds = {name: settings[name] for name in ("rope_type", "type") if settings.get(name) is not None}
        kind = require_equal(kinds, f"{where}: RoPE settings") or "default"
        if kind not in ROPE_KINDS:
            raise ConfigError(f"{where}: rope type {kind!r} is not implemented; known: {', '.join(ROPE_KINDS)}")
        if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"{where}: partial_rotary_factor {settings['partial_rotary_factor']!r} is not implemented"
            )

        def need(name: str) -> float:
            return positive(name, settings.get(name), f"{where}: rope type {kind!r}")

        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, factor=need("factor"))
        if kind == "dynamic":
            return cls(theta, kind, factor=need("factor"), original_length=max_position_embeddings)
        original = original or settings.get("original_max_position_embeddings") or max_position_embeddings
        low, high = need("low_freq_factor"), need("high_freq_factor")
        if not low < high:
            raise ConfigError(f"{where}: low_freq_factor {low} must be below high_freq_factor {high}")
        return cls(
            theta, kind, need("factor"), low, high, int(positive("original_max_position_embeddings", original, where))
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder of Llama's family, and the parts that it has; the defaults are Llama's.

    `from_hf` reads a Llama (Llama 2 to 3.3, Vicuna, DeepSeek-R1-Distill-Llama), `architectures.config_of` any of them.

    model_type: the architecture's name in config.json, a key of `architectures.ARCHITECTURES`.
    attention_bias: biases of q, k, v and o. qkv_bias: biases of q, k and v alone.
    qk_norm: RMSNorm of every query head and key head, before RoPE.
    windows: the sliding window of each layer, None for full attention; (): full attention in all layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    _: dataclasses.KW_ONLY
    model_type: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """Reads a Hugging Face config dictionary.

        Args:
          hf: the parsed `config.json`.
          where: its name, for error messages.
        Raises:
          ConfigError: naming a size that is missing or impossible, or a field that is not implemented.
        """
        refuse_unknown_mathematics(hf, NEUTRAL_VALUES, where)
        return cls(**llama_fields(hf, where))

    def attention_spec(self, layer: int) -> Spec:
        """Returns a layer's window, softcap and scale. Sinks are weights, so a layer with sinks adds them itself."""
        return Spec(window=self.window_of(layer))

    def window_of(self, layer: int) -> int | None:
        """Returns a layer's sliding window, from `windows`; None for full attention."""
        return self.windows[layer] if self.windows else None


def require_same(what: str, ours: int, theirs: int) -> None:
    """Raises ConfigError, naming both sizes, unless draft (`ours`) and target (`theirs`) agree."""
    if ours != theirs:
        raise ConfigError(f"the draft does not fit the target: {what} is {ours} in the draft, {theirs} in the target")


def llama_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reads the fields of a LlamaConfig by name; see `LlamaConfig.from_hf`."""

    def need(name: str) -> int:
        return size(name, hf.get(name), where)

    heads = need("num_attention_heads")
    kv_heads = heads if hf.get("num_key_value_heads") is None else need("num_key_value_heads")
    hidden = need("hidden_size")
    if heads % kv_heads:
        raise ConfigError(f"{where}: {heads} attention heads do not divide into {kv_heads} key-value heads")
    if hf.get("head_dim") is not None:
        head_dim = need("head_dim")
    elif hidden % heads:
        raise ConfigError(f"{where}: hidden_size {hidden} does not divide into {heads} heads; give head_dim")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise ConfigError(f"{where}: head_dim {head_dim} is odd; rotary embedding needs an even one")
    eps = hf.get("rms_norm_eps")
    max_positions = 2048 if hf.get("max_position_embeddings") is None else need("max_position_embeddings")
    return dict(
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive("rms_norm_eps", 1e-6 if eps is None else eps, where),
        rope=RopeConfig.from_hf(hf, max_positions, where),
        max_position_embeddings=max_positions,
        tie_word_embeddings=flag(hf, "tie_word_embeddings", where),
        attention_bias=flag(hf, "attention_bias", where),
        mlp_bias=flag(hf, "mlp_bias", where),
    )
