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
    size,
)
from eagle_jax.models.rope import RopeConfig
from eagle_jax.ops.spec import Spec


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The routed MLPs of a model; see `ops.experts`.

    count: experts in a layer. top_k: experts of a token. intermediate_size: of an expert.
    normalised: see `ops.experts.route`.
    dense_layers: layers that have a plain MLP instead.
    bias: biases of the router and of the experts.
    clamp: (alpha, limit) of `ops.experts.clamped_swiglu`; None for plain SwiGLU.
    """

    count: int
    top_k: int
    intermediate_size: int
    normalised: bool = True
    dense_layers: tuple[int, ...] = ()
    bias: bool = False
    clamp: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder of Llama's family, and the parts that it has; the defaults are Llama's.

    `from_hf` reads a Llama (Llama 2 to 3.3, Vicuna, DeepSeek-R1-Distill-Llama), `architectures.config_of` any of them.

    model_type: the architecture's name in config.json, a key of `architectures.ARCHITECTURES`.
    attention_bias: biases of q, k, v and o. qkv_bias: biases of q, k and v alone.
    qk_norm: RMSNorm of every query head and key head, before RoPE.
    windows: the sliding window of each layer, None for full attention; (): full attention in all layers.
    local_rope: RoPE of the layers with a window, if they have another; see `rope_of`.
    attention_scale, attention_softcap: `scale` and `softcap` of the layers' `Spec`.
    logit_softcap: c, which replaces a logit z by c tanh(z / c). Training caps products with the output weight, too.
    activation: of the MLP's gate, a key of `layers.ACTIVATIONS`.
    norm_plus_one: whether norms multiply by 1 + weight, in float32, rather than by the weight.
    output_norms: norms of the outputs of attention and of the MLP, before they are added to the residual.
    embedding_scale: factor on token embeddings, rounded to their dtype. Heads that borrow the embedding do not apply
      it.
    sinks: a learned logit for each query head, which enters the softmax and has no value.
    experts: None for plain MLPs in all layers.
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
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = "silu"
    norm_plus_one: bool = False
    output_norms: bool = False
    embedding_scale: float = 1.0
    sinks: bool = False
    experts: ExpertsConfig | None = None

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
        """Returns a layer's window, softcap and scale. Sinks are weights, which the layer adds itself."""
        return Spec(window=self.window_of(layer), softcap=self.attention_softcap, scale=self.attention_scale)

    def is_routed(self, layer: int) -> bool:
        """Returns whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def window_of(self, layer: int) -> int | None:
        """Returns a layer's sliding window, from `windows`; None for full attention."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> RopeConfig:
        """Returns the RoPE of a layer."""
        return self.rope if self.local_rope is None or self.window_of(layer) is None else self.local_rope


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
