"""Shapes of models of Llama's family, and of heads for them: abstract, or with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax import Draft, DraftConfig, Eagle3Draft, Llama, LlamaConfig, TreeConfig
from eagle_jax.drafts.dflash import DFlash, DFlashConfig, spaced_taps
from eagle_jax.drafts.dspark import DSpark, DSparkConfig
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.drafts.eagle.p_eagle import PEagle, PEagleConfig
from eagle_jax.drafts.registry import BLOCK_TREE, SHORT_TREE
from eagle_jax.models import params
from eagle_jax.models.architectures import config_of
from eagle_jax.tree import TreePolicy


@dataclasses.dataclass(frozen=True)
class Shape:
    """A target, and an EAGLE-3 head of one Llama layer of its width with a vocabulary of its own."""

    target: LlamaConfig
    head: DraftConfig

    def with_layers(self, layers: int) -> Shape:
        """Returns the shape with another number of target layers."""
        return dataclasses.replace(self, target=dataclasses.replace(self.target, num_layers=layers))


@dataclasses.dataclass(frozen=True)
class Head:
    """A head for a target, in the sizes of published ones.

    make(shape, key, dtype) -> the head. tree: its default.
    """

    make: Callable[[Shape, jax.Array, Any], Draft]
    tree: TreePolicy


def eagle3_head(shape: Shape, key: jax.Array, dtype: Any) -> Eagle3Draft:
    return Eagle3Draft(shape.head, len(tap_layers(shape.head, shape.target.num_layers)), key, dtype)


def dflash_sizes(target: LlamaConfig) -> dict[str, Any]:
    """Returns the fields of a DFlash head as published: five layers of Qwen3 in the target's sizes, blocks of 16."""
    own = {"num_layers": 5, "model_type": "qwen3", "qk_norm": True, "num_target_layers": target.num_layers}
    return {name: getattr(target, name) for name in BLOCK_SIZES} | own | {"taps": spaced_taps(target.num_layers, 5)}


def dflash_head(shape: Shape, key: jax.Array, dtype: Any) -> DFlash:
    return DFlash(DFlashConfig(**dflash_sizes(shape.target)), key, dtype)


def dspark_head(shape: Shape, key: jax.Array, dtype: Any) -> DSpark:
    """Makes a DSpark head as DeepSeek publishes them: a DFlash head of blocks of 7 with a Markov head of rank 256."""
    own = {"block_size": 7, "markov_rank": 256, "confidence": True, "confidence_with_markov": True}
    return DSpark(DSparkConfig(**dflash_sizes(shape.target) | own), key, dtype)


def p_eagle_head(shape: Shape, key: jax.Array, dtype: Any) -> PEagle:
    """Makes a P-EAGLE head: the EAGLE-3 head with four layers and an embedding of its own, for depths up to 8."""
    config = PEagleConfig(**vars(shape.head) | {"num_layers": 4, "own_embedding": True})
    return PEagle(config, len(tap_layers(config, shape.target.num_layers)), key, dtype)


# Heads that draft all depths in one pass, by the name of their kind in the registry.
ONE_PASS: dict[str, Head] = {
    "dflash": Head(dflash_head, BLOCK_TREE),
    "dspark": Head(dspark_head, SHORT_TREE),
    "peagle": Head(p_eagle_head, dataclasses.replace(BLOCK_TREE, depth=PEagleConfig.num_depths)),
}
HEADS: dict[str, Head] = {"eagle3": Head(eagle3_head, TreeConfig()), **ONE_PASS}

# The fields that a DFlash head shares with its target.
BLOCK_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
    *("rms_norm_eps", "rope", "max_position_embeddings"),
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


def abstract_pair(shape: Shape, dtype: Any = jnp.bfloat16, head: str = "eagle3") -> tuple[Llama, Any]:
    """Makes a target and a head of HEADS with ShapeDtypeStructs in place of arrays."""
    return params.abstract(lambda key: random_pair(shape, key, dtype, head))


def random_pair(shape: Shape, key: jax.Array, dtype: Any = jnp.bfloat16, head: str = "eagle3") -> tuple[Llama, Any]:
    """Makes a target and a head with random weights; consumes `key`. Bare, every weight exists in float32 first."""
    target_key, head_key = jax.random.split(key)
    return Llama(shape.target, target_key, dtype), HEADS[head].make(shape, head_key, dtype)
