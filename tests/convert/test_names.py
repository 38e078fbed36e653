from __future__ import annotations

import pytest

from eagle_jax.convert import names
from eagle_jax.convert.error import CheckpointError


@pytest.mark.parametrize(
    ("table", "path", "name"),
    [
        (names.LLAMA, "embed", "model.embed_tokens.weight"),
        (names.LLAMA, "layers.12.attention.q", "model.layers.12.self_attn.q_proj.weight"),
        (names.LLAMA, "layers.0.mlp.down_bias", "model.layers.0.mlp.down_proj.bias"),
        (names.LLAMA, "layers.3.input_norm", "model.layers.3.input_layernorm.weight"),
        (names.EAGLE3, "layer.hidden_norm", "midlayer.hidden_norm.weight"),
        (names.EAGLE3_LAYERS, "layer.attention.o", "layers.0.self_attn.o_proj.weight"),
        (names.EAGLE1, "layer.attention.q_bias", "layers.0.self_attn.q_proj.bias"),
        (names.EAGLE1, "fc_bias", "fc.bias"),
    ],
)
def test_official_name(table: dict[str, str], path: str, name: str):
    assert names.official_name(table, path) == name


def test_official_shape_joins_heads_and_head_dim():
    assert names.official_shape("layers.0.attention.q", (4, 16, 64)) == (64, 64)
    assert names.official_shape("layer.attention.o", (64, 60)) == (64, 60)
    assert names.official_shape("layer.attention.k_bias", (2, 16)) == (32,)
    assert names.official_shape("layers.0.mlp.gate", (128, 64)) == (128, 64)
    assert names.official_shape("layers.0.attention.o_bias", (64,)) == (64,)


def test_tables_name_every_tensor_once():
    for table in (names.LLAMA, names.EAGLE3, names.EAGLE3_LAYERS, names.EAGLE1):
        assert len(set(table.values())) == len(table)


def test_head_kind():
    assert names.head_kind({"midlayer.mlp.up_proj.weight"}, "head") == ("eagle3", names.EAGLE3)
    assert names.head_kind({"layers.0.hidden_norm.weight", "fc.weight"}, "head") == ("eagle3", names.EAGLE3_LAYERS)
    assert names.head_kind({"layers.0.mlp.up_proj.weight", "fc.weight"}, "head") == ("eagle1", names.EAGLE1)


@pytest.mark.parametrize("tensors", [{"model.layers.0.mlp.up_proj.weight"}, {"layers.0.mlp.up_proj.weight"}, set()])
def test_head_kind_refuses_what_is_no_head(tensors: set[str]):
    with pytest.raises(CheckpointError, match=r"some/folder.*not an EAGLE head"):
        names.head_kind(tensors, "some/folder")
