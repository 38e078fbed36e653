"""to_official gives back the source files, bit for bit."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax.convert import from_pretrained, to_official
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.medusa import Medusa
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG, assert_same, eagle1_arrays, read_arrays

PAIR = Path(eagle_jax.__file__).parent / "pair"


@pytest.mark.parametrize(
    ("target", "draft", "dtype"),
    [
        ("t1_target", "t1_eagle3_dv96", None),
        ("t1_target", "t1_eagle3_dv256", "float16"),
        ("t2_target", "t2_eagle1_bias", None),
        ("t2_target", "t2_eagle1_nobias", None),
        (PAIR / "target", PAIR / "head", None),
        (PAIR / "target", PAIR / "head_eagle1", None),
    ],
)
def test_round_trip(golden: Path, target: str, draft: str, dtype: str | None):
    weights = golden / "weights"
    model, head = from_pretrained(weights / target, weights / draft, dtype=dtype)
    assert_same(to_official(head), read_arrays(weights / draft))
    if dtype is None:
        assert_same(to_official(model), read_arrays(weights / target))


def test_biases_and_own_embedding(tmp_path: Path):
    rng = np.random.default_rng(3)
    arrays = folders.llama_arrays()
    config = CONFIG | {"attention_bias": True, "mlp_bias": True}
    for name in [name for name in arrays if "proj.weight" in name]:
        arrays[name.replace("weight", "bias")] = folders.normal(rng, arrays[name].shape[:1])
    target = folders.write_safetensors(tmp_path / "target", config, arrays)
    head_arrays = folders.eagle3_arrays() | {"embed_tokens.weight": folders.normal(rng, (16, 8))}
    head = folders.write_bin(tmp_path / "head", HEAD_CONFIG, head_arrays)
    model, draft = from_pretrained(target, head)
    assert_same(to_official(model), arrays)
    assert_same(to_official(draft), head_arrays)

    arrays = eagle1_arrays()
    for name in "qkv":
        arrays[f"layers.0.self_attn.{name}_proj.bias"] = folders.normal(rng, (12 if name == "q" else 6,))
    head = folders.write_bin(tmp_path / "head1", HEAD_CONFIG | {"qkv_bias": True}, arrays)
    assert_same(to_official(from_pretrained(target, head)[1]), arrays)


def test_tables_of_one_vocabulary_are_regenerated(tmp_path: Path):
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    arrays = folders.eagle3_arrays() | {"lm_head.weight": np.ones((16, 8), np.float32)}
    del arrays["d2t"], arrays["t2d"]
    config = HEAD_CONFIG | {"draft_vocab_size": 16}
    _, draft = from_pretrained(target, folders.write_bin(tmp_path / "head", config, arrays))
    assert_same(to_official(draft), arrays | {"d2t": np.zeros(16, np.int64), "t2d": np.ones(16, np.bool_)})


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_both_namings_of_medusa_heads(tmp_path: Path, file: str, blocks: int):
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    arrays = folders.medusa_arrays(blocks=blocks)
    for prefix in ("medusa_head.", ""):
        named = {prefix + name.removeprefix("medusa_head."): array for name, array in arrays.items()}
        heads = folders.write_medusa(tmp_path / f"heads{prefix}", named, {}, file=file)
        _, draft = from_pretrained(target, heads)
        assert isinstance(draft, Medusa)
        assert_same(to_official(draft), arrays)


@pytest.mark.parametrize("tied", [False, True])
def test_draft_model(tmp_path: Path, tied: bool):
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    arrays = folders.llama_arrays(layers=1)
    if tied:
        del arrays["lm_head.weight"]
    config = CONFIG | {"num_hidden_layers": 1, "tie_word_embeddings": tied}
    _, draft = from_pretrained(target, folders.write_bin(tmp_path / "draft", config, arrays))
    assert isinstance(draft, DraftModel)
    assert_same(to_official(draft), arrays)
    assert_same(to_official(draft.model), arrays)


def test_gradients_come_without_integer_tables(golden: Path):
    _, draft = from_pretrained(golden / "weights" / "t1_target", golden / "weights" / "t1_eagle3_dv96")

    def loss(draft):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(draft) if jnp.issubdtype(leaf.dtype, jnp.floating))

    gradient = to_official(jax.grad(loss, allow_int=True)(draft))
    model = to_official(draft)
    assert gradient.keys() == model.keys() - {"d2t", "t2d"}
    for name, array in gradient.items():
        np.testing.assert_array_equal(array, np.ones_like(model[name]))


def test_gradients_of_other_drafts(tmp_path: Path):
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    for draft in (
        from_pretrained(target, folders.write_medusa(tmp_path / "heads", folders.medusa_arrays()))[1],
        from_pretrained(target, target)[1],
    ):
        gradient = to_official(jax.grad(lambda draft: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(draft)))(draft))
        assert_same(gradient, {name: np.ones_like(array) for name, array in to_official(draft).items()})


def test_other_objects_are_refused():
    with pytest.raises(
        TypeError,
        match="expected one of Llama, PEagle, Eagle3Draft, Eagle1Draft, DSpark, DFlash, Medusa, DraftModel, not dict",
    ):
        to_official({})
