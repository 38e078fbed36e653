"""An architecture with a norm outside of its layers: one class and one entry. docs/guides/target.md has one inside."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from eagle_jax import Llama, PromptLookup, forward, generate
from eagle_jax.convert import convert, from_pretrained, load, to_official
from eagle_jax.models.architectures import ARCHITECTURES, Architecture, config_of
from eagle_jax.models.layers import norm_weight, normed

HF = dict(model_type="normed_embedding", vocab_size=7, hidden_size=16, intermediate_size=12, num_hidden_layers=2)
HF |= dict(num_attention_heads=2, dtype="float32", tie_word_embeddings=True)


class NormedEmbedding(Llama):
    def __init__(self, config, key, dtype=jnp.float32):
        super().__init__(config, key, dtype)
        self.embed_norm = norm_weight(config, config.hidden_size, dtype)

    def embedded(self, tokens):
        return normed(super().embedded(tokens), self.embed_norm, self.config)


def test_a_norm_of_the_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = Architecture(model=NormedEmbedding, outer_names={"embed_norm": "model.embed_norm.weight"})
    monkeypatch.setitem(ARCHITECTURES, "normed_embedding", entry)
    made = NormedEmbedding(config_of(HF), jax.random.key(0))
    made.embed_norm[...] = jnp.linspace(0.5, 2.0, 16)
    (tmp_path / "config.json").write_text(json.dumps(HF))
    save_file(to_official(made), tmp_path / "model.safetensors")
    tokens, lengths = jnp.array([[1, 2, 3, 1, 2]]), jnp.array([5])
    plain = forward(Llama(config_of(HF), jax.random.key(0)), tokens, lengths)[0]
    for model in (from_pretrained(tmp_path)[0], load(convert(tmp_path, None, tmp_path / "out"))[0]):
        jax.tree.map(np.testing.assert_array_equal, model, made)
        assert np.abs(forward(model, tokens, lengths)[0] - plain).max() > 1e-3
    drafted, alone = (
        generate(made, draft, tokens, lengths, max_new_tokens=12) for draft in (PromptLookup(length=3), None)
    )
    assert drafted.tokens.tolist() == alone.tokens.tolist() and drafted.cycles < alone.cycles
