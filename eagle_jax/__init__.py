"""EAGLE speculative decoding in JAX: the same text as the target model, in fewer passes."""

from eagle_jax import sampling
from eagle_jax.api import Chunk, Output, draft_forward, forward, generate, propose, stream
from eagle_jax.convert import CheckpointError, from_pretrained, load, tokenizer
from eagle_jax.decode import DecodeState, cycle, prefill
from eagle_jax.models.config import ConfigError, DraftConfig, LlamaConfig
from eagle_jax.models.eagle1 import Eagle1Draft
from eagle_jax.models.eagle3 import Eagle3Draft
from eagle_jax.models.llama import Llama
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import Tree, TreeConfig

__all__ = [
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DecodeState",
    "DraftConfig",
    "Eagle1Draft",
    "Eagle3Draft",
    "Llama",
    "LlamaConfig",
    "Output",
    "SamplingConfig",
    "Tree",
    "TreeConfig",
    "cycle",
    "draft_forward",
    "forward",
    "from_pretrained",
    "generate",
    "load",
    "prefill",
    "propose",
    "sampling",
    "stream",
    "tokenizer",
]
