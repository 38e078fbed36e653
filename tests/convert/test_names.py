from __future__ import annotations

import pytest

from eagle_jax.convert import names
from eagle_jax.convert.dialects import draft_kind
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


def test_medusa_names():
    assert names.medusa_names(2, 1) == {
        "heads.0.blocks.0.weight": "medusa_head.0.0.linear.weight",
        "heads.0.blocks.0.bias": "medusa_head.0.0.linear.bias",
        "heads.0.lm_head": "medusa_head.0.1.weight",
        "heads.1.blocks.0.weight": "medusa_head.1.0.linear.weight",
        "heads.1.blocks.0.bias": "medusa_head.1.0.linear.bias",
        "heads.1.lm_head": "medusa_head.1.1.weight",
    }
    two = names.medusa_names(12, 2, prefix="")
    assert names.official_name(two, "heads.11.blocks.1.bias") == "11.1.linear.bias"
    assert names.official_name(two, "heads.11.lm_head") == "11.2.weight"
    assert len(set(two.values())) == len(two) == 12 * 5
    assert names.medusa_names(1, 0) == {"heads.0.lm_head": "medusa_head.0.0.weight"}


def test_draft_kind():
    assert draft_kind({"midlayer.mlp.up_proj.weight"}, "head") == ("eagle3", names.EAGLE3)
    assert draft_kind({"layers.0.hidden_norm.weight", "fc.weight"}, "head") == ("eagle3", names.EAGLE3_LAYERS)
    assert draft_kind({"layers.0.mlp.up_proj.weight", "fc.weight"}, "head") == ("eagle1", names.EAGLE1)
    dflash = {"layers.0.mlp.up_proj.weight", "fc.weight", "hidden_norm.weight"}
    assert draft_kind(dflash, "head") == ("dflash", names.DFLASH)
    assert draft_kind({"model.layers.0.mlp.up_proj.weight"}, "model") == ("llama", names.LLAMA)


@pytest.mark.parametrize("prefix", ["medusa_head.", ""])
@pytest.mark.parametrize(("heads", "blocks"), [(1, 0), (1, 1), (5, 1), (12, 3)])
def test_draft_kind_counts_medusa_heads_and_blocks(prefix: str, heads: int, blocks: int):
    table = names.medusa_names(heads, blocks, prefix)
    assert draft_kind(set(table.values()), "heads") == ("medusa", table)
    first_and_last = {table["heads.0.lm_head"], table[f"heads.{heads - 1}.lm_head"]}
    assert draft_kind(first_and_last, "heads") == ("medusa", table)  # so that what is missing can be named


@pytest.mark.parametrize(
    "tensors", [{"layers.0.mlp.up_proj.weight"}, {"medusa_head.100.0.weight", "0.weight", "0.0.linear.scale"}, set()]
)
def test_draft_kind_refuses_what_is_no_draft(tensors: set[str]):
    with pytest.raises(CheckpointError, match=r"some/folder: not a draft: .*its tensors are"):
        draft_kind(tensors, "some/folder")
