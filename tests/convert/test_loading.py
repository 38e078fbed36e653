"""load, from_pretrained and tokenizer: dtypes, meshes, independence of the source files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.layout import Layout
from transformers import AutoTokenizer

import eagle_jax
from eagle_jax.convert import (
    CheckpointError,
    convert,
    from_pretrained,
    load,
    loading,
    to_official,
    tokenizer,
    tokenizing,
)
from eagle_jax.convert.loading import load_without_layers
from eagle_jax.drafts.dflash import DFlash, DFlashConfig
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.files.atomic import files_below
from eagle_jax.models import params
from eagle_jax.models.llama import Llama
from eagle_jax.sharding import path_layout, path_sharding
from eagle_jax.train.run.save import save_target
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG, assert_same

PAIR = Path(eagle_jax.__file__).parent / "pair"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    return target, folders.write_bin(tmp_path / "head", HEAD_CONFIG, folders.eagle3_arrays())


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", jnp.float16])
def test_load_casts_as_from_pretrained_does(pair: tuple[Path, Path], tmp_path: Path, dtype: object):
    out = convert(*pair, tmp_path / "out")
    for ours, theirs in zip(load(out, dtype=dtype), from_pretrained(*pair, dtype=dtype), strict=True):
        assert ours.dtype == theirs.dtype == (dtype or "float32")
        assert_same(to_official(ours), to_official(theirs))


def test_load_refuses_values_too_large_for_a_dtype(tmp_path: Path):
    arrays = folders.llama_arrays()
    arrays["lm_head.weight"].flat[0] = 1e6
    out = convert(folders.write_safetensors(tmp_path / "target", CONFIG, arrays), None, tmp_path / "out")
    load(out, dtype="bfloat16")
    with pytest.raises(CheckpointError, match="lm_head is too large for float16"):
        load(out, dtype="float16")


@pytest.mark.parametrize("tied", [False, True])
def test_a_target_without_its_layers_is_read_without_them(tmp_path: Path, tied: bool):
    """They hold NaN in the checkpoint, which reading refuses, and are missing in the converted folder."""
    arrays, config = folders.llama_arrays(), CONFIG | {"tie_word_embeddings": tied}
    if tied:
        del arrays["lm_head.weight"]
    source = folders.write_safetensors(tmp_path / "target", config, arrays)
    out, (whole, _) = convert(source, None, tmp_path / "out"), from_pretrained(source)
    for part in (out / "target" / "parameters").glob("layers.*"):
        shutil.rmtree(part)
    damaged = {name: array * np.float32("nan") if ".layers." in name else array for name, array in arrays.items()}
    folders.write_safetensors(source, config, damaged)
    for read in (lambda: load(out), lambda: from_pretrained(source)):
        with pytest.raises(CheckpointError, match=r"layers\.0.* (is missing|holds NaN)"):
            read()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = params.flatten(whole.without_layers())
    assert expected.keys() == {"embed", "norm"} | (set() if tied else {"lm_head"})
    for ends in (load_without_layers(source), load_without_layers(out, mesh=mesh)):
        assert ends.config == whole.config
        for path, array in params.flatten(ends).items():
            np.testing.assert_array_equal(array, expected[path])
    assert ends.embed[...].sharding == path_sharding("embed", ends.embed.shape, mesh)
    assert load_without_layers(out, dtype="bfloat16").dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="has 0 of its 2 layers"):
        eagle_jax.forward(ends, np.ones((1, 2), np.int32), np.array([2]))


def test_arrays_are_stored_in_the_layout_that_their_path_wants(pair: tuple[Path, Path], tmp_path: Path, monkeypatch):
    """A CPU stores all by rows, and a TPU an embedding by columns; here columns are wanted, to see the difference."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected, out = params.flatten(from_pretrained(*pair)[0]), convert(*pair, tmp_path / "out")
    assert path_layout("embed", (3, 4)) == path_layout("target.embed", (3, 4)) == Layout((0, 1))
    assert path_layout("layers.1.mlp.experts.down", (2, 3, 4)) == Layout((0, 1, 2))
    assert path_layout("layers.1.mlp.down", (3, 4)) is path_layout("norm", (3,)) is None
    monkeypatch.setattr(loading, "path_layout", lambda path, shape: Layout((1, 0)) if path == "embed" else None)
    for target, _ in (load(out, mesh=mesh), load(out, dtype="float32"), from_pretrained(*pair, mesh=mesh)):
        for path, array in params.flatten(target).items():
            order = (1, 0) if path == "embed" else tuple(range(array.ndim))
            assert array.format.layout.major_to_minor == order, path
            np.testing.assert_array_equal(array, expected[path])
    assert target.embed[...].sharding == path_sharding("embed", target.embed.shape, mesh)


def test_target_ids_are_read(pair: tuple[Path, Path], tmp_path: Path):
    for draft in (from_pretrained(*pair)[1], load(convert(*pair, tmp_path / "out"), dtype="bfloat16")[1]):
        assert draft.target_ids.dtype == jnp.int32
        np.testing.assert_array_equal(draft.target_ids[...], folders.DRAFT_IDS)


@pytest.mark.parametrize("write", [folders.write_safetensors, folders.write_bin])
def test_models_do_not_share_memory_with_files(tmp_path: Path, write):
    arrays = folders.llama_arrays()
    folder = write(tmp_path, CONFIG, arrays)
    model, _ = from_pretrained(folder)
    (file,) = (file for file in folder.iterdir() if file.name != "config.json")
    with file.open("r+b") as opened:
        opened.write(b"\1" * file.stat().st_size)
    assert_same(to_official(model), arrays)


@pytest.fixture(params=["medusa", "dflash", "llama"])
def other_pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A target, and Medusa heads, a DFlash head or a model as its draft."""
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    if request.param == "medusa":
        return target, folders.write_medusa(tmp_path / "draft", folders.medusa_arrays(2, 2), {})
    config = CONFIG | {"num_hidden_layers": 1}
    if request.param == "dflash":
        own = {"mask_token_id": 3, "target_layer_ids": [0, 1]}
        config |= {"model_type": "qwen3", "block_size": 4, "dflash_config": own}
        arrays = to_official(DFlash(DFlashConfig.from_hf(config), jax.random.key(0)))
        return target, folders.write_safetensors(tmp_path / "draft", config, arrays)
    return target, folders.write_bin(tmp_path / "draft", config, folders.llama_arrays(1))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_other_drafts_load_onto_a_mesh(other_pair: tuple[Path, Path], tmp_path: Path, dtype: str | None):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    out = convert(*other_pair, tmp_path / "out")
    _, plain = from_pretrained(*other_pair, dtype=dtype)
    expected = params.flatten(plain)
    for _, draft in (load(out, dtype=dtype, mesh=mesh), from_pretrained(*other_pair, dtype=dtype, mesh=mesh)):
        assert jax.tree.structure(draft) == jax.tree.structure(plain)
        for path, array in params.flatten(draft).items():
            assert array.sharding == path_sharding(path, array.shape, mesh), path
            assert np.asarray(array).tobytes() == np.asarray(expected[path]).tobytes(), path
            if path.endswith("lm_head"):
                assert array.addressable_shards[0].data.shape == (8, 8)  # half of the vocabulary


def test_other_drafts_are_what_their_classes_make(other_pair: tuple[Path, Path], tmp_path: Path):
    """The same pytree, so that one program serves models that were loaded, converted, or made."""
    draft = load(convert(*other_pair, tmp_path / "out"))[1]
    key = jax.random.key(0)
    model = isinstance(draft, DraftModel)
    made = DraftModel(Llama(draft.model.config, key)) if model else type(draft)(draft.config, key)
    for model in (draft, from_pretrained(*other_pair)[1]):
        assert jax.tree.structure(model) == jax.tree.structure(made)


def as_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    linear = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


@pytest.mark.parametrize("blocks", [1, 2])
def test_medusa_heads_compute_what_pytorch_computes(tmp_path: Path, blocks: int):
    arrays = folders.medusa_arrays(blocks=blocks)
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    _, draft = from_pretrained(target, folders.write_medusa(tmp_path / "heads", arrays, {}))
    x = folders.normal(np.random.default_rng(5), (7, 8))
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for i, head in enumerate(draft.heads):
        hidden = torch.from_numpy(x)
        for j in range(blocks):
            name = f"medusa_head.{i}.{j}.linear"
            linear = as_linear(state[f"{name}.weight"], state[f"{name}.bias"])
            hidden = hidden + torch.nn.functional.silu(linear(hidden))
        theirs = as_linear(state[f"medusa_head.{i}.{blocks}.weight"])(hidden)
        np.testing.assert_allclose(head(jnp.asarray(x)), theirs.detach().numpy(), atol=1e-5, rtol=1e-5)


MESH = """
import json, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from eagle_jax.convert import from_pretrained, load
from eagle_jax.models import params
from eagle_jax.sharding import path_sharding

target, draft, out = sys.argv[1:]
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
report = {}
pairs = {"load": load(out, mesh=mesh), "from_pretrained": from_pretrained(target, draft, mesh=mesh)}
pairs["cast"] = load(out, mesh=mesh, dtype="bfloat16")
plain, plain_cast = from_pretrained(target, draft), from_pretrained(target, draft, dtype="bfloat16")
for name, models in pairs.items():
    for model, whole in zip(models, plain_cast if name == "cast" else plain):
        expected = params.flatten(whole)
        for path, array in params.flatten(model).items():
            assert array.sharding == path_sharding(path, array.shape, mesh), (name, path, array.sharding)
            assert np.asarray(array).tobytes() == np.asarray(expected[path]).tobytes(), (name, path)
            local = list(array.addressable_shards[0].data.shape)
            report[f"{type(model).__name__} {path}"] = [list(array.sharding.spec), local]
print(json.dumps(report))
"""


def test_every_array_goes_to_its_sharding_on_eight_devices(pair: tuple[Path, Path], tmp_path: Path):
    out = convert(*pair, tmp_path / "out")
    command = [sys.executable, "-W", "error", "-c", MESH, *map(str, (*pair, out))]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["Llama layers.0.attention.q"] == [["tensor", None, None], [1, 6, 8]]
    assert report["Llama layers.0.attention.k"] == [[None, None, None], [1, 6, 8]]  # one head does not divide into 2
    assert report["Llama layers.1.mlp.down"] == [[None, "tensor"], [8, 6]]
    assert report["Eagle3Draft layer.attention.o"] == [[None, "tensor"], [8, 6]]
    assert report["Eagle3Draft target_ids"] == [[], [5]]


def test_one_device_arrays_are_plain(golden: Path):
    model, _ = from_pretrained(golden / "weights" / "t2_target")
    assert all(len(array.devices()) == 1 for array in params.flatten(model).values())


def test_tokenizer_of_source_and_conversion(tmp_path: Path):
    out = convert(PAIR / "target", None, tmp_path / "out")
    text = "def add(a, b): return a + b"
    ids = [tokenizer(path)(text)["input_ids"] for path in (PAIR / "target", out, str(out))]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) > 1


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
def test_a_named_tokenizer_is_what_transformers_would_choose(tmp_path: Path, named: str | None):
    folder = tmp_path / "target"
    shutil.copytree(PAIR / "target", folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": named, "chat_template": "{{ messages[0].content }}"}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    ours, theirs = tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs) and ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template == config["chat_template"]
    for text in ("def __init__(self):\n    return 1", "<|bos|> é \t x", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("contents", [None, "{", '{"version": "1.0"}'])
def test_tokenizer_absent_or_damaged(tmp_path: Path, contents: str | None):
    folder = folders.write_safetensors(tmp_path, CONFIG, folders.llama_arrays())
    if contents is not None:
        (folder / "tokenizer.json").write_text(contents)
    with pytest.raises(CheckpointError, match=f"{folder}: no usable tokenizer files"):
        tokenizer(folder)


def test_a_sentencepiece_tokenizer_names_the_packages_that_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folders.write_safetensors(tmp_path, CONFIG, folders.llama_arrays())
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setattr(tokenizing, "_installed", lambda module: module != "sentencepiece")
    needed = r"tokenizer.model: .* needs the package sentencepiece: pip install 'eagle-jax\[sentencepiece\]'"
    with pytest.raises(CheckpointError, match=needed):
        tokenizer(folder)
    monkeypatch.setattr(tokenizing, "_installed", lambda module: False)
    with pytest.raises(CheckpointError, match="needs the packages sentencepiece and protobuf"):
        tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")  # of tiktoken
    with pytest.raises(CheckpointError, match="no usable tokenizer files"):
        tokenizer(folder)
    monkeypatch.setattr(tokenizing, "_installed", lambda module: True)
    with pytest.raises(CheckpointError, match="no usable tokenizer files"):  # a damaged one
        tokenizer(folder)


def test_a_converted_folder_is_no_official_one(pair: tuple[Path, Path], tmp_path: Path):
    out = convert(*pair, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{out}: is a converted folder; load it with eagle_jax.load.*--model"):
        from_pretrained(out)


def test_a_trained_target_is_saved_with_all_that_belongs_to_it(tmp_path: Path):
    source = folders.write_safetensors(tmp_path / "source", CONFIG, folders.llama_arrays())
    names = {"tokenizer.model", "chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json"}
    for name in (*names, "notes.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    save_target(from_pretrained(source)[0], source / "config.json", tmp_path / "saved", "float32")
    assert {path.as_posix() for path in files_below(tmp_path / "saved")} == names | {"config.json", "model.safetensors"}
    assert_same(to_official(from_pretrained(tmp_path / "saved")[0]), folders.llama_arrays())
