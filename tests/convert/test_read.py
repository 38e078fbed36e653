"""Opening folders: every layout gives the same tensors, every damage an error that names the file."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub import errors

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.hub import Hub, resolve
from eagle_jax.convert.match import Match, match_target
from eagle_jax.convert.read import open_checkpoint
from eagle_jax.files.atomic import files_below
from tests.convert import folders
from tests.convert.folders import CONFIG, assert_same, llama_arrays, read_arrays, write_bin, write_safetensors

INDEX = "model.safetensors.index.json"
SHARDS = folders.shard_names("model", "safetensors", 3)


def write_pt(folder: Path, config: dict, arrays: folders.Arrays) -> Path:
    return folders.write_medusa(folder, arrays, config)


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_holds_the_same_bits(tmp_path: Path, dtype: str):
    arrays = {name: array.astype(dtype) for name, array in llama_arrays().items()}
    arrays |= {
        "scalar": np.array(3.0, np.float32),
        "table": np.arange(3),
        "marks": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
    }
    layouts = [
        write_safetensors(tmp_path / "single", CONFIG, arrays),
        write_safetensors(tmp_path / "single_index", CONFIG, arrays, index=True),
        write_safetensors(tmp_path / "sharded", CONFIG, arrays, shards=3),
        write_safetensors(tmp_path / "no_index", CONFIG, arrays, shards=3, index=False),
        write_bin(tmp_path / "bin", CONFIG, arrays),
        write_bin(tmp_path / "bin_sharded", CONFIG, arrays, shards=3),
        write_bin(tmp_path / "bin_old", CONFIG, arrays, zipped=False),
    ]
    for folder in layouts:
        assert_same(read_arrays(folder), arrays)


def test_parity_folder_reads_the_same_from_both_formats(golden: Path, tmp_path: Path):
    source = golden / "weights" / "t1_target"
    assert [file.name for file in open_checkpoint(source).files] == ["model.safetensors"]
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(source / name, tmp_path)
    assert_same(read_arrays(tmp_path), read_arrays(source))


def test_tensors_are_views_of_the_file(tmp_path: Path):
    arrays = llama_arrays() | {"odd": np.zeros(3, np.uint8), "wide": np.ones(4, np.float32)}
    for tensor in open_checkpoint(write_safetensors(tmp_path, CONFIG, arrays)).tensors.values():
        assert not tensor.load().flags.writeable


def test_strided_and_shared_bin_tensors(tmp_path: Path):
    write_bin(tmp_path, CONFIG, {})
    base = torch.arange(12.0).reshape(3, 4)
    state = {"view": base.T, "row": base[1], "parameter": torch.nn.Parameter(base.bfloat16())}
    torch.save(state, tmp_path / "pytorch_model.bin")
    arrays = read_arrays(tmp_path)
    np.testing.assert_array_equal(arrays["view"], base.T.numpy())
    np.testing.assert_array_equal(arrays["row"], base[1].numpy())
    assert arrays["parameter"].dtype == ml_dtypes.bfloat16


def test_safetensors_wins_over_bin(tmp_path: Path):
    write_bin(tmp_path, CONFIG, {"a": np.zeros(2, np.float32)})
    write_safetensors(tmp_path, CONFIG, {"a": np.ones(2, np.float32)})
    assert_same(read_arrays(tmp_path), {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_medusa_heads(tmp_path: Path, file: str, zipped: bool):
    arrays = folders.medusa_arrays()
    folder = folders.write_medusa(tmp_path, arrays, file=file)
    if not zipped and not file.endswith(".safetensors"):
        state = {name: folders.as_torch(array) for name, array in arrays.items()}
        torch.save(state, folder / file, _use_new_zipfile_serialization=False)
    assert [path.name for path in open_checkpoint(folder).files] == [file]
    assert_same(read_arrays(folder), arrays)


@pytest.mark.parametrize("file", ["optimizer.pt", "medusa_lm_head_2.pt", "model.pt"])
def test_other_pt_files_are_not_read(tmp_path: Path, file: str):
    folder = folders.write_medusa(tmp_path, folders.medusa_arrays(), file=file)
    with pytest.raises(
        CheckpointError, match=r"holds no weights \(\*.safetensors, \*.bin, \*.gguf or medusa_lm_head.pt\)"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_a_model_wins_over_medusa_heads_beside_it(tmp_path: Path, write: Callable[..., Path]):
    folders.write_medusa(tmp_path, folders.medusa_arrays())
    assert_same(read_arrays(write(tmp_path, CONFIG, llama_arrays())), llama_arrays())


def test_damaged_medusa_file(tmp_path: Path):
    folder = folders.write_medusa(tmp_path, folders.medusa_arrays())
    torch.save({"0.0.weight": Hostile(tmp_path / "ran")}, folder / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.pt: PyTorch's weights-only reader refuses"):
        open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_leftover_index_does_not_hide_an_intact_file(tmp_path: Path):
    arrays = llama_arrays()
    write_safetensors(tmp_path / "sharded", CONFIG, arrays, shards=3)
    single = write_safetensors(tmp_path / "single", CONFIG, arrays)
    shutil.copy(tmp_path / "sharded" / INDEX, single)
    assert_same(read_arrays(single), arrays)
    only_bin = write_bin(tmp_path / "bin", CONFIG, arrays)
    shutil.copy(tmp_path / "sharded" / INDEX, only_bin)
    assert_same(read_arrays(only_bin), arrays)


def test_index_need_not_list_everything_and_settles_duplicates(tmp_path: Path):
    arrays = llama_arrays()
    write_safetensors(tmp_path, CONFIG, arrays, shards=3)
    edit_json(tmp_path / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert_same(read_arrays(tmp_path), arrays)
    other = {"model.norm.weight": np.zeros(8, np.float32)}
    folders.save_file(other, tmp_path / "model-extra.safetensors")
    assert_same(read_arrays(tmp_path), arrays)  # a shard that the index does not name is not read
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is also in"):
        open_target(tmp_path)


def open_target(folder: Path) -> Match:
    """Opens a folder and looks for every tensor that its model needs."""
    return match_target(open_checkpoint(folder), np.dtype(np.float32))


@pytest.mark.parametrize("file", ["other-00004-of-00004.safetensors", SHARDS[1]])
def test_an_index_may_list_what_nobody_reads(tmp_path: Path, file: str):
    """Whether or not the file is there; nor does a tensor matter that two files hold, where no model reads it."""
    write_safetensors(tmp_path, CONFIG, llama_arrays(), shards=3)
    unread = {"model.mtp.layers.0.weight": file, "model.layers.0.self_attn.rotary_emb.inv_freq": file}
    edit_json(tmp_path / INDEX, lambda index: index["weight_map"].update(unread))
    match = open_target(tmp_path)
    np.testing.assert_array_equal(match.read("norm"), llama_arrays()["model.norm.weight"])
    (tmp_path / INDEX).unlink()
    for name in ("model-a.safetensors", "model-b.safetensors"):
        folders.save_file({"rotary_emb.inv_freq": np.ones(2, np.float32)}, tmp_path / name)
    open_target(tmp_path)


def set_shard(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda v: v["weight_map"].update({"lm_head.weight": name}))


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size if size >= 0 else (folder / name).stat().st_size + size)


def header(text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / SHARDS[0]).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))

    return write


SHARD_DAMAGE = {
    "shard missing": (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]}.*missing"),
    "all shards missing": (lambda f: [(f / s).unlink() for s in SHARDS], f"{SHARDS[0]}.*missing"),
    "shard missing, no index": (lambda f: [(f / n).unlink() for n in (INDEX, SHARDS[2])], f"{SHARDS[2]}.*missing"),
    "no weights": (lambda f: [(f / n).unlink() for n in (INDEX, *SHARDS)], "holds no weights"),
    "index names a tensor its shard lacks": (set_shard(SHARDS[2]), f"{SHARDS[2]}.*'lm_head.weight'"),
    "index names an unknown shard": (set_shard("other.safetensors"), "other.safetensors.*missing"),
    "index escapes": (set_shard("../model.safetensors"), f"{INDEX}.*'lm_head.weight'.*outside"),
    "index is absolute": (set_shard("/tmp/model.safetensors"), f"{INDEX}.*'lm_head.weight'.*outside"),
    "index escapes by backslash": (set_shard("..\\model.safetensors"), f"{INDEX}.*outside"),
    "index names another kind of file": (set_shard("config.json"), f"{INDEX}.*'lm_head.weight'.*no weight file"),
    "index names no file": (set_shard(None), f"{INDEX}.*'lm_head.weight'.*no weight file"),  # type: ignore[arg-type]
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}.*weight_map"),
    "index truncated": (cut(INDEX, 100), f"{INDEX}.*not valid JSON"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}.*JSON object"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json.*cannot be read"),
    "config truncated": (cut("config.json", 20), "config.json.*not valid JSON"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json.*not valid JSON"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json.*not valid JSON"),
    "shard empty": (cut(SHARDS[0], 0), f"{SHARDS[0]}.*header is cut off"),
    "shard truncated in header": (cut(SHARDS[0], 60), f"{SHARDS[0]}.*header is cut off"),
    "shard truncated in values": (cut(SHARDS[0], -5), f"{SHARDS[0]}.*damaged or incomplete"),
    "shard longer": (lambda f: (f / SHARDS[0]).open("ab").close() or cut(SHARDS[0], 99_999)(f), "header describes"),
    "header not JSON": (header(b"{nonsense"), f"{SHARDS[0]}.*not valid JSON"),
    "header nested": (header(b"[" * 100_000), f"{SHARDS[0]}.*not valid JSON"),
    "header a list": (header(b"[1, 2]"), f"{SHARDS[0]}.*not a JSON object"),
    "entry malformed": (header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "'a' has a malformed"),
    "entry negative": (
        header(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'),
        "'a' has a malformed",
    ),
    "entry past the end": (header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'), "'a' ends at"),
    "entry of other size": (
        header(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
        "'a' has 8 bytes",
    ),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shards(tmp_path: Path, damage: str):
    write_safetensors(tmp_path, CONFIG, llama_arrays(), shards=3)
    open_target(tmp_path)
    inflict, message = SHARD_DAMAGE[damage]
    inflict(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_target(tmp_path)
    assert str(tmp_path) in str(error.value)


class Hostile:
    """Its pickle makes a folder when it is loaded by an ordinary reader."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


BIN = "pytorch_model.bin"
BIN_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut(BIN, -200), "weights-only reader refuses"),
    "cut short": (cut(BIN, 3), "weights-only reader refuses"),
    "empty": (cut(BIN, 0), "weights-only reader refuses"),
    "not pickle": (lambda f: (f / BIN).write_bytes(b"<html>404</html>"), "weights-only reader refuses"),
    "hostile zip": (lambda f: torch.save({"a": Hostile(f / "ran")}, f / BIN), "weights-only reader refuses"),
    "hostile pickle": (
        lambda f: (f / BIN).write_bytes(pickle.dumps(Hostile(f / "ran"))),
        "weights-only reader refuses",
    ),
    "a list": (lambda f: torch.save([torch.zeros(2)], f / BIN), "holds a list"),
    "nested": (lambda f: torch.save({"state_dict": {"a": torch.zeros(2)}}, f / BIN), "'state_dict' is a dict"),
    "sparse": (lambda f: torch.save({"a": torch.eye(2).to_sparse()}, f / BIN), "'a' is not a plain dense tensor"),
}


@pytest.mark.parametrize("damage", BIN_DAMAGE)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:.*sparse.*:UserWarning")
def test_damaged_bin(tmp_path: Path, damage: str, zipped: bool):
    write_bin(tmp_path, CONFIG, llama_arrays(), zipped=zipped)
    open_checkpoint(tmp_path)
    inflict, message = BIN_DAMAGE[damage]
    inflict(tmp_path)
    with pytest.raises(CheckpointError, match=f"{BIN}.*{message}"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("write", "suffix"), [(write_bin, "bin"), (write_pt, "pt")])
def test_no_torch_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable, suffix: str):
    write(tmp_path, CONFIG, llama_arrays())
    importer = builtins.__import__

    def without_torch(name: str, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(CheckpointError, match=rf"reading .{suffix} files.*pip install eagle-jax\[torch\]"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "folder", "./a", "/a/b", "../x", Path("a/b")])
def test_absent_folders(source: str | Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(source)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_hub_downloads_one_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    arrays, write = llama_arrays(), {"safetensors": write_safetensors, "bin": write_bin, "pt": write_pt}[suffix]
    write(tmp_path / "repository", CONFIG, arrays)
    unread = ("optimizer.pt", "original/consolidated.bin", "original/params.json", "original/model.safetensors")
    for name in (*unread, "additional_chat_templates/tool_use.jinja", "tokenizer.model"):
        (tmp_path / "repository" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(b"large")
    calls = []

    def download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None, **options) -> str:
        calls.append((repo_id, options))
        names = [str(path) for path in files_below(tmp_path / "repository")]
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "snapshot" / name).parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "repository" / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("owner/some-model", weights=False)
    assert [str(path) for path in files_below(tmp_path / "snapshot")] == [
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "tokenizer.model",
    ]
    checkpoint = open_checkpoint("owner/some-model", Hub("v2", token="secret", local_files_only=True))
    asked = {"revision": "v2", "token": "secret", "local_files_only": True}
    assert calls[-1] == ("owner/some-model", asked)
    assert not (tmp_path / "snapshot" / "original").exists()
    assert (checkpoint.source, [file.suffix for file in checkpoint.files]) == ("owner/some-model", [f".{suffix}"])
    assert checkpoint.tensors.keys() == arrays.keys()
    assert not (tmp_path / "snapshot" / "optimizer.pt").exists()


def hub_error(kind: type[Exception]) -> Exception:
    """An answer of the hub, made without the response that it comes from."""
    error = kind.__new__(kind)
    error.args = ("503 for url",)
    return error


HUB_FAILURES = {
    "gated": (
        hub_error(errors.GatedRepoError),
        "is gated: ask for access on https://huggingface.co/owner/name.*HF_TOKEN",
    ),
    "absent": (hub_error(errors.RepositoryNotFoundError), "has no such repository.*check the name, or log in"),
    "revision": (hub_error(errors.RevisionNotFoundError), "has no revision 'v2'"),
    "network": (
        errors.LocalEntryNotFoundError("Name not known\nmore"),
        "cannot be reached .Name not known.: check the net",
    ),
    "server": (hub_error(errors.HfHubHTTPError), "downloading it from the Hugging Face hub failed: 503 for url"),
    "disk": (OSError("No space left"), "failed: No space left"),
}


@pytest.mark.parametrize("failure", HUB_FAILURES)
def test_hub_failures_say_what_helps(monkeypatch: pytest.MonkeyPatch, failure: str):
    error, message = HUB_FAILURES[failure]

    def download(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=f"owner/name: no such folder, and .*{message}"):
        open_checkpoint("owner/name", Hub("v2"))


@pytest.mark.parametrize("hub", [None, Hub(local_files_only=True)])
def test_without_network_the_cache_counts(hub: Hub | None):
    setting = "HF_HUB_OFFLINE" if hub is None else "local_files_only"  # conftest sets the former
    with pytest.raises(CheckpointError, match=f"cache of the Hugging Face hub does not hold it.*without {setting}"):
        open_checkpoint("owner/absent", hub)


def test_a_mistyped_folder_is_answered_with_near_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_safetensors(tmp_path / "models" / "llama-8b", CONFIG, llama_arrays())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed, meant in (
        ("./models/lama-8b", "models/llama-8b"),
        ("model/llama-8b", "models/llama-8b"),
        ("~/models/llama-8b", tmp_path / "models/llama-8b"),
        (str(tmp_path / "models" / "llama-8b-"), tmp_path / "models/llama-8b"),
    ):
        with pytest.raises(CheckpointError, match=rf"{typed}: no such folder \(did you mean {meant}\?\)"):
            open_checkpoint(typed)
    with pytest.raises(CheckpointError, match=r"^mistral: no such folder; a hub id is OWNER/NAME$"):
        open_checkpoint("mistral")
    with pytest.raises(CheckpointError, match=r"config.json: is a file; name the folder"):
        open_checkpoint("models/llama-8b/config.json")
    with pytest.raises(CheckpointError, match=r"is a folder, and a revision \('v2'\) is one of a hub repository"):
        open_checkpoint("models/llama-8b", Hub("v2"))
