"""A head of several layers with the norms of EAGLE-3.1: read into its parameters, converted, and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eagle_jax.convert import convert, from_pretrained, load
from eagle_jax.models import params
from tests.convert import folders
from tests.convert.folders import CONFIG, normal

LAYER = {name: value for name, value in CONFIG.items() if name != "torch_dtype"} | {
    "num_hidden_layers": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
SPECULATORS = {
    "architectures": ["Eagle3DraftModel"],
    "speculators_model_type": "eagle3",
    "transformer_layer_config": LAYER,
    "draft_vocab_size": 5,
    "norm_before_residual": True,
    "norm_output": True,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
}


@pytest.mark.parametrize("norm", ["fc_norm", "norm_before_fc"])
def test_a_head_of_parts_is_read_and_converted(norm, tmp_path: Path):
    rng = np.random.default_rng(3)
    arrays = folders.eagle3_arrays("layers.0") | folders.layer("layers.1", rng)
    arrays |= {"layers.1.input_layernorm.weight": normal(rng, (8,)), "embed_tokens.weight": normal(rng, (16, 8))}
    names = {"fc_norm": ["fc_norm.0", "fc_norm.1", "fc_norm.2"], "norm_before_fc": ["input_norm"]}[norm]
    arrays |= {f"{name}.weight": normal(rng, (24 // len(names),)) for name in names}
    target = folders.write_safetensors(tmp_path / "target", CONFIG | {"num_hidden_layers": 8}, folders.llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", SPECULATORS | {norm: True}, arrays)

    _, draft = from_pretrained(target, head)
    config, leaves = draft.config, params.flatten(draft)
    assert (config.num_layers, config.windows, config.taps) == (2, (4, None), (2, 4, 5))
    assert config.norm_output and config.norm_before_residual and getattr(config, norm)
    for path, name in {
        **{name: f"{name}.weight" for name in names},
        "layer.hidden_norm": "layers.0.hidden_norm.weight",
        "layers.1.input_norm": "layers.1.input_layernorm.weight",
        "layers.1.attention.q": "layers.1.self_attn.q_proj.weight",
    }.items():
        np.testing.assert_array_equal(np.asarray(leaves[path]).reshape(arrays[name].shape), arrays[name])

    convert(target, head, tmp_path / "converted")
    again = load(tmp_path / "converted")[1]
    assert again.config == config
    for path, leaf in params.flatten(again).items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)
