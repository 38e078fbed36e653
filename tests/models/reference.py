"""Random transformers models, and their weights under this package's parameter paths.

The name map is written out here and not taken from `eagle_jax.convert`, so that an error there is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from eagle_jax.models import params
from eagle_jax.models.cache import KVCache
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.models.target import TargetOutput

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)


def random_model(seed: int = 0, **fields: Any) -> transformers.LlamaForCausalLM:
    """Makes a model of SMALL with `fields` changed and every parameter random, biases and norms too.

    Skips the test where PyTorch is not installed.
    """
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


def our_model(model: transformers.LlamaForCausalLM, hf: Mapping[str, Any] | None = None) -> Llama:
    """Makes our copy of a model. hf: its config.json, by default the one that transformers would write."""
    config = LlamaConfig.from_hf(model.config.to_dict() if hf is None else hf)
    return load_target(config, {name: weight.detach().numpy() for name, weight in model.state_dict().items()})


def load_target(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> Llama:
    """Makes a target of `config` with the tensors of a Hugging Face folder."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return fill(lambda key: Llama(config, key), {name: tensors[name] for name in set(tensors) - tied})


def fill(build: Callable[[jax.Array], Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """Fills the model of `build` with PyTorch's tensors; splitting heads is a reshape."""
    model = params.abstract(build)
    shapes = {path: leaf.shape for path, leaf in params.flatten(model).items()}
    arrays = {our_path(name): tensor for name, tensor in tensors.items()}
    return params.load(model, {path: jnp.asarray(array.reshape(shapes[path])) for path, array in arrays.items()})


def our_path(name: str) -> str:
    """Translates a name: "model.layers.3.self_attn.q_proj.bias" -> "layers.3.attention.q_bias"."""
    for theirs, ours in (
        ("model.", ""),
        ("self_attn", "attention"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("input_layernorm", "input_norm"),
        ("embed_tokens", "embed"),
        ("_proj", ""),
        ("midlayer", "layer"),
        (".weight", ""),
        (".bias", "_bias"),
    ):
        name = name.replace(theirs, ours)
    return name


def causal(batch: int, tokens: int) -> jax.Array:
    return jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (batch, tokens, tokens))


@jax.jit(static_argnames="taps")
def prompt_pass(
    model: Llama, tokens: jax.Array, lengths: jax.Array, taps: tuple[int, ...] = ()
) -> tuple[TargetOutput, jax.Array]:
    """Runs one pass over right-padded prompts [B, T]; also returns the logits [B, T, V]."""
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    out = model(tokens, positions, causal(batch, width), prompt_lengths=lengths, taps=taps)
    return out, model.logits(out.hidden)


@jax.jit
def one_step(model: Llama, token: jax.Array, cache: KVCache, prompt_lengths: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs token [B, 1] at the cache's length; returns logits [B, V] and the cache with its position written."""
    mask = jnp.ones((token.shape[0], 1, 1), bool)
    out = model(token, cache.length[:, None], mask, prompt_lengths=prompt_lengths, cache=cache)
    cache = cache.write(out.new_kv, cache.length).with_length(cache.length + 1)
    return model.logits(out.hidden)[:, 0], cache


def prefilled(model: Llama, tokens: jax.Array, lengths: jax.Array, rows: int) -> tuple[jax.Array, KVCache]:
    """Returns logits [B, V] after each prompt, and a cache of `rows` positions that holds it."""
    out, logits = prompt_pass(model, tokens, lengths)
    empty = KVCache.zeros(model.config, tokens.shape[0], rows, model.dtype)
    cache = empty.write(out.new_kv, jnp.zeros((), jnp.int32)).with_length(lengths)
    return jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0], cache
