"""Model configurations: frozen, read from a Hugging Face `config.json`.

A field that changes the mathematics and is not implemented is refused by name: a config that loads is a
config that is computed as written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.models.speculators import flat_config

ROPE_KINDS = ("default", "linear", "dynamic", "llama3")

# Fields of other architectures (or of Llama derivatives) that change the forward pass, with the values that
# leave it unchanged. Any other value is refused. `None` and an absent field are always neutral.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "eagle", "eagle3"),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (0, False),
    "use_sliding_window": (False,),
    "sliding_window_pattern": (0,),
    "attention_chunk_size": (0,),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "rope_interleaved": (False,),
    "interleaved_rope": (False,),
    "no_rope_layers": ((), []),
    "no_rope_layer_interval": (0,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (0,),
    "attn_logit_softcapping": (0, 0.0),
    "final_logit_softcapping": (0, 0.0),
    "logit_cap": (0, 0.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_embeddings": (False,),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "dim_model_base": (),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "alibi": (False,),
    "position_embedding_type": ("rope", "rotary", "absolute"),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "kv_lora_rank": (),
    "q_lora_rank": (),
    "attention_sinks": (False,),
    "is_causal": (True,),
    "quantization_config": (),
    "norm_type": ("rmsnorm", "rms_norm"),
    "lm_head_bias": (False,),
}
# The same for draft heads.
NEUTRAL_DRAFT_VALUES: dict[str, tuple[Any, ...]] = {
    "norm_before_fc": (False,),
    "fc_norm": (False,),
    "norm_output": (False,),
    "use_input_layernorm_in_first_layer": (False,),
    "use_last_layernorm": (False,),
    "parallel_drafting": (False,),
    "mlp_only": (False,),
    "layernorms": (False,),
    "use_aux_norm": (False,),
    "add_para_norm": (False,),
}


class ConfigError(ValueError):
    """A configuration that this package does not implement, or that contradicts itself."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base and its scaling.

    kind: one of ROPE_KINDS. `factor` is read by linear, dynamic and llama3, the two frequency factors by
    llama3. `original_length` is in tokens: the pretraining length of llama3, and the length above which
    dynamic stretches its base.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], max_position_embeddings: int, where: str) -> RopeConfig:
        """Reads both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters`."""
        settings = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        theta = settings.pop("rope_theta", None)
        if theta is None:
            theta = hf.get("rope_theta")
        theta = _positive("rope_theta", 10000.0 if theta is None else theta, where)
        if any(isinstance(value, Mapping) for value in settings.values()):
            raise ConfigError(f"{where}: RoPE settings per layer type ({sorted(settings)}) are not implemented")
        kinds = {settings[name] for name in ("rope_type", "type") if settings.get(name) is not None}
        if len(kinds) > 1:
            raise ConfigError(f"{where}: rope_type and type of the RoPE settings differ: {sorted(kinds)}")
        kind = kinds.pop() if kinds else "default"
        if kind not in ROPE_KINDS:
            raise ConfigError(f"{where}: rope type {kind!r} is not implemented; known: {', '.join(ROPE_KINDS)}")
        if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"{where}: partial_rotary_factor {settings['partial_rotary_factor']!r} is not implemented"
            )

        def need(name: str) -> float:
            return _positive(name, settings.get(name), f"{where}: rope type {kind!r}")

        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, factor=need("factor"))
        if kind == "dynamic":
            return cls(theta, kind, factor=need("factor"), original_length=max_position_embeddings)
        original = hf.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
        low, high = need("low_freq_factor"), need("high_freq_factor")
        if not low < high:
            raise ConfigError(f"{where}: low_freq_factor {low} must be below high_freq_factor {high}")
        return cls(theta, kind, need("factor"), low, high, int(original or max_position_embeddings))


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama-architecture model (Llama 2 to 3.3, Vicuna, DeepSeek-R1-Distill-Llama)."""

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

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """Reads a Hugging Face config dictionary.

        Args:
          hf: the parsed `config.json`.
          where: its name, for messages.
        Raises:
          ConfigError: a missing or impossible size, or a field that is not implemented; the message names it.
        """
        refuse_unknown_mathematics(hf, NEUTRAL_VALUES, where)
        return cls(**_llama_fields(hf, where))


@dataclasses.dataclass(frozen=True)
class DraftConfig(LlamaConfig):
    """The shape of an EAGLE head: one decoder layer and what feeds it.

    draft_vocab_size: Vd, the entries of the head's own `lm_head` (EAGLE-3).
    target_hidden_size: hidden size of the target whose features it reads; differs from `hidden_size` for the
      head of the 70B target.
    taps: target layers whose *input* is read; None means layers 2, n // 2 and n - 3 of an n-layer target.
    norm_before_residual: the layer's residual is the normalised hidden state (some speculators heads).
    own_embedding: the checkpoint holds the head's embedding; else the target's is used.
    fc_bias, qkv_bias: EAGLE-1 only.
    window: the draft attends to the text's first window[0] and its latest window[1] positions; None: to all of it.
      No checkpoint says so; see `with_window`.
    """

    draft_vocab_size: int = 0
    target_hidden_size: int = 0
    taps: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    own_embedding: bool = False
    fc_bias: bool = False
    qkv_bias: bool = False
    window: tuple[int, int] | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json", own_embedding: bool = False) -> DraftConfig:
        """Reads a head's config dictionary, that of speculators too; `own_embedding` comes from its tensor names.

        Raises:
          ConfigError: as LlamaConfig.from_hf.
        """
        try:
            hf = flat_config(hf, where)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        refuse_unknown_mathematics(hf, NEUTRAL_VALUES | NEUTRAL_DRAFT_VALUES, where)
        fields = _llama_fields({"num_hidden_layers": 1} | dict(hf), where)
        if fields["num_layers"] != 1:
            raise ConfigError(f"{where}: a head has one layer, num_hidden_layers is {fields['num_layers']}")
        draft_vocab_size = hf.get("draft_vocab_size")
        target_hidden_size = hf.get("target_hidden_size")
        return cls(
            **fields,
            draft_vocab_size=_size("draft_vocab_size", draft_vocab_size, where)
            if draft_vocab_size is not None
            else fields["vocab_size"],
            target_hidden_size=_size("target_hidden_size", target_hidden_size, where)
            if target_hidden_size is not None
            else fields["hidden_size"],
            taps=_taps(hf, where),
            norm_before_residual=_flag(hf, "norm_before_residual", where),
            own_embedding=own_embedding,
            fc_bias=_flag(hf, "bias", where, default=True),
            qkv_bias=_flag(hf, "qkv_bias", where),
        )


def require_same(what: str, ours: int, theirs: int) -> None:
    """Raises ConfigError, naming both sizes, unless the draft's is the target's."""
    if ours != theirs:
        raise ConfigError(f"the draft does not fit the target: {what} is {ours} in the draft, {theirs} in the target")


def tap_layers(config: DraftConfig | None, num_layers: int) -> tuple[int, ...]:
    """The target layers whose input an EAGLE-3 head reads, ascending (official code: 2, n // 2, n - 3).

    Index n is the residual stream after the last layer. Indices that coincide are repeated.
    """
    if config is not None and config.taps is not None:
        return config.taps
    return tuple(sorted(min(max(tap, 0), num_layers) for tap in (2, num_layers // 2, num_layers - 3)))


def refuse_unknown_mathematics(hf: Mapping[str, Any], neutral: Mapping[str, tuple], where: str) -> None:
    """Raises ConfigError for a field whose value changes the forward pass in a way not implemented here."""
    for name, values in neutral.items():
        value = hf.get(name)
        if value is not None and value not in values:
            accepted = ", ".join(repr(v) for v in values) or "null"
            raise ConfigError(f"{where}: {name} = {value!r} is not implemented (accepted: {accepted})")
    layer_types = set(hf.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise ConfigError(f"{where}: layer_types {sorted(layer_types)} are not implemented (only full_attention)")


def _llama_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    def size(name: str) -> int:
        return _size(name, hf.get(name), where)

    heads = size("num_attention_heads")
    kv_heads = heads if hf.get("num_key_value_heads") is None else size("num_key_value_heads")
    hidden = size("hidden_size")
    if heads % kv_heads:
        raise ConfigError(f"{where}: {heads} attention heads do not divide into {kv_heads} key-value heads")
    if hf.get("head_dim") is not None:
        head_dim = size("head_dim")
    elif hidden % heads:
        raise ConfigError(f"{where}: hidden_size {hidden} does not divide into {heads} heads; give head_dim")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise ConfigError(f"{where}: head_dim {head_dim} is odd; rotary embedding needs an even one")
    eps = hf.get("rms_norm_eps")
    max_positions = 2048 if hf.get("max_position_embeddings") is None else size("max_position_embeddings")
    return dict(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive("rms_norm_eps", 1e-6 if eps is None else eps, where),
        rope=RopeConfig.from_hf(hf, max_positions, where),
        max_position_embeddings=max_positions,
        tie_word_embeddings=_flag(hf, "tie_word_embeddings", where),
        attention_bias=_flag(hf, "attention_bias", where),
        mlp_bias=_flag(hf, "mlp_bias", where),
    )


def _taps(hf: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Tap layers named by a head config, as layer *inputs*.

    The nested field (SGLang, vLLM exports) names layers whose output is read: output of i = input of i + 1.
    The top-level one (speculators) names layers whose input is read.
    """
    nested = hf.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state") is False:
        raise ConfigError(f"{where}: eagle_config.use_aux_hidden_state = False is not implemented")
    name = "eagle_aux_hidden_state_layer_ids"
    found = {}
    if nested.get(name) is not None:
        found["eagle_config." + name] = tuple(layer + 1 for layer in _layer_ids(nested[name], where))
    if hf.get(name) is not None:
        found[name] = _layer_ids(hf[name], where)
    if len(set(found.values())) > 1:
        raise ConfigError(f"{where}: {' and '.join(found)} name different layers: {found}")
    return next(iter(found.values()), None)


def _layer_ids(value: Any, where: str) -> tuple[int, ...]:
    valid = isinstance(value, list | tuple) and value and all(type(v) is int and v >= 0 for v in value)
    if not valid:
        raise ConfigError(f"{where}: eagle_aux_hidden_state_layer_ids must list layer indices, got {value!r}")
    return tuple(value)


def _size(name: str, value: Any, where: str) -> int:
    if value is None:
        raise ConfigError(f"{where}: {name} is missing")
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where}: {name} must be a positive integer, got {value!r}")
    return value


def _flag(hf: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    value = hf.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name} must be true or false, got {value!r}")
    return value


def _positive(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{where}: {name} must be a positive number, got {value!r}")
    return float(value)
