"""A small target as a Hugging Face folder, with a tokenizer made on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from eagle_jax import Llama, LlamaConfig
from eagle_jax.train.run.save import save_target
from tests.toy import scaled

VOCAB = 352  # enough for the tokenizers of chat_templates.py
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_target(folder: Path, tokenizer: Any, seed: int = 0, **config: Any) -> Path:
    """Random weights, whose text wanders, and the tokenizer."""
    source = folder.with_name(f"{folder.name}-source")
    tokenizer.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(CONFIG | config))
    model = scaled(Llama(LlamaConfig.from_hf(CONFIG | config), jax.random.key(seed)), 6.0)
    save_target(model, source / "config.json", folder, "float32")
    return folder
