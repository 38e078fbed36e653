"""Shapes of models of Llama's family, and pairs of a target and a head: abstract, or with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax import DFlash, DFlashConfig, DraftConfig, Eagle3Draft, Llama, LlamaConfig
from eagle_jax.drafts.dflash import spaced_taps
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.models import params
from eagle_jax.models.architectures import config_of


@dataclasses.dataclass(frozen=True)
class Shape:
    """A target, and an EAGLE-3 head of one Llama layer of its width with a vocabulary of its own."""

    target: LlamaConfig
    head: DraftConfig

    def with_layers(self, layers: int) -> Shape:
        """Returns the shape with another number of target layers."""
        return dataclasses.replace(self, target=dataclasses.replace(self.target, num_layers=layers))

    @property
    def block_head(self) -> DFlashConfig:
        """The config of a DFlash head as published: five layers of Qwen3 in the target's sizes, blocks of 16."""
        target, layers = self.target, 5
        return DFlashConfig(
            target.vocab_size,
            target.hidden_size,
            target.intermediate_size,
            layers,
            target.num_heads,
            target.num_kv_heads,
            target.head_dim,
            target.rms_norm_eps,
            target.rope,
            target.max_position_embeddings,
            model_type="qwen3",
            qk_norm=True,
            taps=spaced_taps(target.num_layers, layers),
            num_target_layers=target.num_layers,
        )


# The fields that a head shares with its target.
HEAD_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps"),
)


def llama_shape(sizes: dict[str, Any], draft_vocab_size: int = 32000) -> Shape:
    """Returns the shape of a target with these fields of a Hugging Face config, and of a head of its width."""
    shared = dict(max_position_embeddings=131072, rms_norm_eps=1e-5) | sizes
    head = {name: shared[name] for name in HEAD_SIZES if name in shared} | dict(draft_vocab_size=draft_vocab_size)
    return Shape(config_of(shared), DraftConfig.from_hf(head))


SHAPES: dict[str, Shape] = {
    # of no published model: small enough for tests to run
    "tiny": llama_shape(
        dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        draft_vocab_size=128,
    ),
    # Llama-3.2-1B
    "1b": llama_shape(
        dict(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        )
    ),
    # Llama-3.1-8B; the head is that of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
    "8b": llama_shape(
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    ),
    # Qwen3-8B
    "qwen3-8b": llama_shape(
        dict(
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            max_position_embeddings=40960,
            rope_theta=1e6,
        )
    ),
    # Gemma-2-9B
    "gemma2-9b": llama_shape(
        dict(
            model_type="gemma2",
            vocab_size=256000,
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            rms_norm_eps=1e-6,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ),
    # Llama-3.3-70B
    "70b": llama_shape(
        dict(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        )
    ),
}


# Targets with experts. bench/decode/work.py does not count their work, which depends on the experts that are chosen.
ROUTED: dict[str, Shape] = {
    # Qwen3-30B-A3B
    "qwen3-30b-a3b": llama_shape(
        dict(
            model_type="qwen3_moe",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            rms_norm_eps=1e-6,
            max_position_embeddings=40960,
            rope_theta=1e6,
        )
    ),
    # gpt-oss-20b
    "gpt-oss-20b": llama_shape(
        dict(
            model_type="gpt_oss",
            vocab_size=201088,
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=24,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=32,
            num_experts_per_tok=4,
        )
    ),
}


def abstract_pair(shape: Shape, dtype: Any = jnp.bfloat16) -> tuple[Llama, Eagle3Draft]:
    """Makes a target and a head with ShapeDtypeStructs in place of arrays."""
    return params.abstract(lambda key: random_pair(shape, key, dtype))


def random_pair(shape: Shape, key: jax.Array, dtype: Any = jnp.bfloat16) -> tuple[Llama, Eagle3Draft]:
    """Makes a target and a head with random weights; consumes `key`. Bare, every weight exists in float32 first."""
    target_key, head_key = jax.random.split(key)
    taps = len(tap_layers(shape.head, shape.target.num_layers))
    return Llama(shape.target, target_key, dtype), Eagle3Draft(shape.head, taps, head_key, dtype)


def abstract_block_head(shape: Shape, dtype: Any = jnp.bfloat16) -> DFlash:
    """Makes a DFlash head with ShapeDtypeStructs in place of arrays."""
    return params.abstract(lambda key: DFlash(shape.block_head, key, dtype))
