"""Small heads and targets with random values in every array, made without compiling anything."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from eagle_jax import DraftConfig, Eagle1Draft, Eagle3Draft, Llama, LlamaConfig, PEagle, PEagleConfig
from eagle_jax.drafts.dflash import DFlash, DFlashConfig
from eagle_jax.drafts.dspark import DSpark, DSparkConfig
from eagle_jax.models import params
from eagle_jax.models.config import RopeConfig

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(theta=500000.0),
    "max_position_embeddings": 64,
}
OF_BLOCKS = {
    "num_layers": 2,
    "qk_norm": True,
    "model_type": "qwen3",
    "block_size": 4,
    "mask_token_id": 15,
    "taps": (2, 5),
}
HEADS = {"markov_rank": 3, "confidence": True, "confidence_with_markov": True}
LLAMA3 = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 32)


def filled(abstract: Any, seed: int = 0) -> Any:
    """A model with random values in every array, norms and biases too."""
    rng = np.random.default_rng(seed)
    return params.load(
        abstract, {path: jnp.asarray(values(rng, leaf)) for path, leaf in params.flatten(abstract).items()}
    )


def values(rng: np.random.Generator, leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return np.sort(rng.permutation(16)[: leaf.shape[0]]).astype(np.int32)
    return rng.standard_normal(leaf.shape).astype(leaf.dtype)


def target(layers: int = 8, hidden: int = 8, real: bool = False) -> Llama:
    config = LlamaConfig(**SIZES | {"hidden_size": hidden, "num_layers": layers})
    abstract = params.abstract(lambda key: Llama(config, key))
    return filled(abstract, 7) if real else abstract


def eagle3(dtype: Any = jnp.float32, num_taps: int = 3, **changes: Any) -> Eagle3Draft:
    config = DraftConfig(**SIZES | {"num_layers": 1, "draft_vocab_size": 5, "target_hidden_size": 8} | changes)
    return filled(params.abstract(lambda key: Eagle3Draft(config, num_taps, key, dtype)))


def peagle(dtype: Any = jnp.float32, num_taps: int = 3, **changes: Any) -> PEagle:
    own = {"num_layers": 2, "draft_vocab_size": 5, "target_hidden_size": 8, "mask_token_id": 11, "num_depths": 6}
    config = PEagleConfig(**SIZES | own | changes)
    return filled(params.abstract(lambda key: PEagle(config, num_taps, key, dtype)))


def eagle1(dtype: Any = jnp.float32, **changes: Any) -> Eagle1Draft:
    config = DraftConfig(**SIZES | {"num_layers": 1, "draft_vocab_size": 16, "target_hidden_size": 8} | changes)
    return filled(params.abstract(lambda key: Eagle1Draft(config, key, dtype)))


def dflash(**changes: Any) -> DFlash:
    config = DFlashConfig(**SIZES | OF_BLOCKS | changes)
    return filled(params.abstract(lambda key: DFlash(config, key)))


def dspark(**changes: Any) -> DSpark:
    config = DSparkConfig(**SIZES | OF_BLOCKS | HEADS | changes)
    return filled(params.abstract(lambda key: DSpark(config, key)))
