"""convert: what the folder holds, where it may go, and that nothing half-written or changed loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax.convert import CheckpointError, convert, from_pretrained, load, to_official
from eagle_jax.convert.converted import restore_part, save_part
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG, assert_same, read_arrays

PAIR = Path(eagle_jax.__file__).parent / "pair"
GOLDEN = Path(__file__).parents[1] / "golden" / "weights"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sources")
    target = folders.write_safetensors(root / "target", CONFIG, folders.llama_arrays(), shards=2)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "additional_chat_templates/tool_use.jinja",
        "README.md",
        "original/params.json",
    ):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(f"contents of {name}")
    return target, folders.write_bin(root / "head", HEAD_CONFIG, folders.eagle3_arrays())


@pytest.fixture(scope="module")
def pristine(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(*sources, tmp_path_factory.mktemp("pristine") / "out")


@pytest.fixture
def converted(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def assert_loads(folder: Path, sources: tuple[Path, Path]) -> None:
    for model, source in zip(load(folder), sources, strict=True):
        assert_same(to_official(model), read_arrays(source))


def test_contents(pristine: Path, sources: tuple[Path, Path]):
    assert_loads(pristine, sources)
    target, head = sources
    small = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    assert [(pristine / "target" / name).read_text() for name in small] == [f"contents of {name}" for name in small]
    assert sorted(file.name for file in (pristine / "target").iterdir()) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "parameters",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (pristine / "target" / "config.json").read_bytes() == (target / "config.json").read_bytes()
    assert (pristine / "draft" / "config.json").read_bytes() == (head / "config.json").read_bytes()
    manifest = json.loads((pristine / "manifest.json").read_text())
    assert (manifest["version"], manifest["dtype"]) == (1, "float32")
    assert (manifest["target"]["kind"], manifest["draft"]["kind"]) == ("llama", "eagle3")
    assert manifest["draft"]["source"] == str(head) and manifest["draft"]["own_embedding"] is False
    assert manifest["target"]["files"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(target.glob("*.safetensors"))
    }
    assert sorted(manifest["target"]["parts"]) == ["embed", "layers.0", "layers.1", "lm_head", "rest"]
    assert manifest["draft"]["parts"]["rest"]["arrays"]["target_ids"] == {"shape": [5], "dtype": "int32"}


def test_nothing_is_left_beside_it(pristine: Path):
    assert list(pristine.parent.iterdir()) == [pristine]


def test_target_alone(sources: tuple[Path, Path], tmp_path: Path):
    target, draft = load(convert(sources[0], None, tmp_path / "out"))
    assert draft is None
    assert_same(to_official(target), read_arrays(sources[0]))


@pytest.mark.parametrize(
    ("target", "head"),
    [(PAIR / "target", PAIR / "head"), (GOLDEN / "t2_target", GOLDEN / "t2_eagle1_nobias")],
)
def test_real_checkpoints(tmp_path: Path, target: Path, head: Path):
    models = load(convert(target, head, tmp_path / "out"))
    for model, source in zip(models, (target, head), strict=True):
        assert_same(to_official(model), read_arrays(source))


@pytest.mark.parametrize("blocks", [1, 2])
def test_medusa_heads(sources: tuple[Path, Path], tmp_path: Path, blocks: int):
    arrays = folders.medusa_arrays(5, blocks)
    older = {name.removeprefix("medusa_head."): array for name, array in arrays.items()}
    config = {"medusa_num_heads": 2, "medusa_num_layers": blocks}
    out = convert(sources[0], folders.write_medusa(tmp_path / "heads", older, config), tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())["draft"]
    assert (manifest["kind"], manifest["own_embedding"]) == ("medusa", False)
    assert list(manifest["files"]) == ["medusa_lm_head.pt"]
    assert sorted(manifest["parts"]) == [f"heads.{i}" for i in range(5)]
    assert manifest["parts"]["heads.4"]["arrays"]["heads.4.lm_head"] == {"shape": [16, 8], "dtype": "float32"}
    _, draft = load(out)
    assert isinstance(draft, Medusa)
    assert draft.config == MedusaConfig(vocab_size=16, hidden_size=8, num_heads=5, num_blocks=blocks)
    assert_same(to_official(draft), arrays)


@pytest.mark.parametrize("tied", [False, True])
def test_draft_model(sources: tuple[Path, Path], tmp_path: Path, tied: bool):
    arrays = folders.llama_arrays(layers=1)
    if tied:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]  # a repeat is accepted, and not kept
    config = CONFIG | {"num_hidden_layers": 1, "tie_word_embeddings": tied}
    draft_folder = folders.write_safetensors(tmp_path / "draft", config, arrays)
    out = convert(sources[0], draft_folder, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())["draft"]
    assert (manifest["kind"], manifest["own_embedding"]) == ("llama", False)
    assert set(manifest["parts"]) == {"embed", "layers.0", "rest"} | (set() if tied else {"lm_head"})
    _, draft = load(out)
    assert isinstance(draft, DraftModel)
    if tied:
        del arrays["lm_head.weight"]
    assert_same(to_official(draft), arrays)


def test_dtype_is_cast_once(sources: tuple[Path, Path], tmp_path: Path):
    out = convert(*sources, tmp_path / "out", dtype="bfloat16")
    for ours, theirs in zip(load(out), from_pretrained(*sources, dtype="bfloat16"), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert_same(to_official(ours), to_official(theirs))


def test_arrays_larger_than_a_chunk(tmp_path: Path):
    arrays = {"embed": np.arange(1000, dtype=np.float32).reshape(20, 50), "norm": np.ones(3, np.float32)}
    save_part(tmp_path / "part", arrays, chunk_bytes=64)
    assert_same(restore_part(tmp_path / "part", arrays), arrays)


def test_progress_reaches_its_total(sources: tuple[Path, Path], tmp_path: Path):
    calls: list[tuple[int, int]] = []
    convert(*sources, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] and len({total for _, total in calls}) == 1


# Where it may go.


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


USERS = {
    "tuned.json": "[]",
    "other_head/config.json": "{}",
    "target/notes.txt": "mine",
    "target/parameters_old/x": "x",
    "draft/.cache": "y",
}


@pytest.fixture
def lived_in(converted: Path) -> Path:
    """A converted folder with files of the user's."""
    for name, text in USERS.items():
        (converted / name).parent.mkdir(exist_ok=True)
        (converted / name).write_text(text)
    (converted / "link").symlink_to("target")
    return converted


CHANGES: dict[str, Callable[[Path, Path], dict]] = {
    "no draft": lambda target, head: dict(target=target, draft=None),
    "another draft": lambda target, head: dict(target=target, draft=target),
    "another target": lambda target, head: dict(target=head.parent / "other", draft=head),
    "another dtype": lambda target, head: dict(target=target, draft=head, dtype="bfloat16"),
    "another hub id": lambda target, head: dict(target="owner/target", draft=head),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_conversion_is_refused(lived_in: Path, sources: tuple[Path, Path], change: str):
    other = folders.llama_arrays()
    other["model.norm.weight"] += 1
    folders.write_safetensors(sources[1].parent / "other", CONFIG, other)
    before = snapshot(lived_in)
    message = f"{lived_in}: holds another conversion .target {sources[0]}, draft .*--overwrite .*keeps .*tuned.json"
    with pytest.raises(CheckpointError, match=message):
        convert(out=lived_in, **CHANGES[change](*sources))
    assert snapshot(lived_in) == before and list(lived_in.parent.iterdir()) == [lived_in]


def test_the_same_conversion_is_kept(lived_in: Path, sources: tuple[Path, Path], tmp_path: Path):
    """Wherever its sources lie."""
    before, said = snapshot(lived_in), []
    for pair in (sources, tuple(Path(shutil.copytree(source, tmp_path / source.name)) for source in sources)):
        assert convert(*pair, lived_in, note=said.append) == lived_in
    assert said == [f"{lived_in} holds this conversion already, nothing was written"] * 2
    assert snapshot(lived_in) == before
    (lived_in / "target" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds another conversion"):  # it does not load
        convert(*sources, lived_in)


def test_overwriting_replaces_only_what_a_conversion_wrote(lived_in: Path, sources: tuple[Path, Path]):
    (lived_in / "target" / "chat_template.jinja").write_text("edited")
    said: list[str] = []
    convert(sources[0], None, lived_in, overwrite=True, note=said.append)
    assert load(lived_in)[1] is None
    assert [path.name for path in (lived_in / "draft").iterdir()] == [".cache"]
    assert {name: (lived_in / name).read_text() for name in USERS} == USERS and (lived_in / "link").is_symlink()
    assert list(lived_in.parent.iterdir()) == [lived_in]
    assert len(said) == 3 and f"kept in {lived_in}: link, tuned.json, draft/.cache, other_head/config.json" in said[0]
    assert said[1] == "tuned.json was made with other weights: run `eagle-jax tune` again, or delete it"
    assert said[2] == "replaced, though changed after the previous conversion: target/chat_template.jinja"

    said.clear()
    convert(sources[0], None, lived_in, overwrite=True, note=said.append)
    assert len(said) == 1  # of the same weights
    convert(*sources, lived_in, overwrite=True)
    assert_loads(lived_in, sources)


def test_an_error_while_overwriting_leaves_everything(lived_in: Path, tmp_path: Path):
    arrays, before = folders.llama_arrays(), snapshot(lived_in)
    arrays["model.norm.weight"][0] = np.nan
    with pytest.raises(CheckpointError, match="holds NaN"):
        convert(folders.write_safetensors(tmp_path / "nan", CONFIG, arrays), None, lived_in, overwrite=True)
    assert snapshot(lived_in) == before


def test_folders_without_links_are_copied(lived_in: Path, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    def link(*paths, **options):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", link)
    convert(sources[0], None, lived_in, overwrite=True)
    assert {name: (lived_in / name).read_text() for name in USERS} == USERS and (lived_in / "link").is_symlink()


def test_an_empty_folder_is_used(sources: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert_loads(convert(*sources, tmp_path / "out"), sources)


def test_other_folders_are_kept_unless_overwritten(sources: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=f"{out}: is not empty and not a converted folder.*--overwrite"):
        convert("owner/not-fetched", None, out)
    convert(*sources, out, overwrite=True)
    assert_loads(out, sources)
    assert (out / "thesis.tex").read_text() == "years of work" and list(tmp_path.iterdir()) == [out]
    convert(sources[0], None, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work" and load(out)[1] is None


@pytest.mark.parametrize("name", ["target", "draft", "manifest.json"])
def test_files_of_no_conversion_are_not_replaced(sources: tuple[Path, Path], tmp_path: Path, name: str):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"out: holds {name}, which no conversion wrote.*move that away"):
        convert(*sources, tmp_path / "out", overwrite=True)


def test_a_manifest_of_another_tool_is_not_a_conversion(sources: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    for text in ('{"name": "a web app"}', "[]", "not json"):
        (out / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a converted folder"):
            convert(*sources, out)


def test_sources_and_files_are_never_replaced(sources: tuple[Path, Path], tmp_path: Path):
    for out in (sources[0], sources[1], sources[0].parent):
        with pytest.raises(CheckpointError, match="is or contains the source"):
            convert(*sources, out, overwrite=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(*sources, tmp_path / "file", overwrite=True)
    assert_same(read_arrays(sources[0]), folders.llama_arrays())


def test_full_disk_is_noticed_before_writing(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .* GB are needed"):
        convert(*sources, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_does_not_fit_is_refused_before_writing(sources: tuple[Path, Path], golden: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="vocab_size is 256 in the draft, 16 in the target"):
        convert(sources[0], golden / "weights" / "t1_eagle3_dv96", tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


# Interrupted conversions.


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, sources: tuple[Path, Path]):
    arrays = folders.llama_arrays()
    arrays["model.norm.weight"][0] = np.nan  # found after the embedding and the layers are written
    damaged = folders.write_safetensors(tmp_path / "target", CONFIG, arrays)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"model.norm.weight' holds NaN"):
        convert(damaged, None, out)
    assert list(tmp_path.iterdir()) == [damaged]
    assert_loads(convert(*sources, out), sources)


KILLED = """
import os, signal, sys
from eagle_jax.convert import convert, converted
write = converted.save_part

def save_part(folder, arrays):
    write(folder, arrays)
    if folder.name == "layers.1":
        print("half done", flush=True)
        signal.pause()

converted.save_part = save_part
convert(sys.argv[1], sys.argv[2], sys.argv[3], overwrite=True)
"""


@pytest.mark.parametrize("previous", [False, True])
def test_a_killed_conversion_leaves_nothing_that_loads(
    tmp_path: Path, sources: tuple[Path, Path], pristine: Path, previous: bool
):
    out = tmp_path / "out"
    if previous:
        shutil.copytree(pristine, out)
    command = [sys.executable, "-c", KILLED, *map(str, sources), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half done\n"
        process.send_signal(signal.SIGKILL)
    (partial,) = (path for path in tmp_path.iterdir() if path != out)
    with pytest.raises(CheckpointError, match="not a converted folder"):
        load(partial)
    if previous:
        assert_loads(out, sources)
    else:
        assert not out.exists()
    assert_loads(convert(*sources, out), sources)
    assert list(tmp_path.iterdir()) == [out]


def test_killed_between_the_two_renames(converted: Path, sources: tuple[Path, Path]):
    converted.rename(converted.with_name(".out.old"))
    assert_loads(convert(*sources, converted), sources)
    assert list(converted.parent.iterdir()) == [converted]


# Folders that were changed after the conversion.


def part(role: str, name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / role / "parameters" / name


def largest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit_manifest(*keys: str | int, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = entry = json.loads(path.read_text())
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value
        path.write_text(json.dumps(manifest))

    return edit


embed, head_rest = part("target", "embed"), part("draft", "rest")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in the values": (lambda f: flip(largest(embed(f)), -1), "embed: damaged or changed"),
    "flipped bit in the middle": (lambda f: flip(largest(head_rest(f)), 100), "draft.*rest: damaged or changed"),
    "truncated values": (lambda f: os.truncate(largest(embed(f)), 50), "embed: damaged or changed"),
    "values missing": (lambda f: largest(embed(f)).unlink(), "embed: damaged or changed"),
    "extra file in a part": (lambda f: (embed(f) / "more").write_text("x"), "embed: damaged or changed"),
    "part missing": (lambda f: shutil.rmtree(embed(f)), "embed: this part is missing"),
    "parts swapped": (
        lambda f: [
            shutil.rmtree(part("target", "lm_head")(f)),
            shutil.copytree(embed(f), part("target", "lm_head")(f)),
        ],
        "lm_head: damaged or changed",
    ),
    "config edited": (
        lambda f: (f / "target/config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5e5})),
        "changed",
    ),
    "config missing": (lambda f: (f / "draft/config.json").unlink(), "draft/config.json: cannot be read"),
    "draft missing": (lambda f: shutil.rmtree(f / "draft"), "draft/config.json: cannot be read"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "not a converted folder.*manifest.json"),
    "manifest truncated": (lambda f: os.truncate(f / "manifest.json", 700), "manifest.json: not valid JSON"),
    "manifest empty": (lambda f: os.truncate(f / "manifest.json", 0), "manifest.json: not valid JSON"),
    "manifest of another tool": (lambda f: (f / "manifest.json").write_text("{}"), "not the manifest of a converted"),
    "newer format": (edit_manifest("version", value=2), "format version 2, this version of eagle_jax reads 1; upgrade"),
    "no target": (edit_manifest("target", value=None), "an entry is missing or malformed"),
    "no parts": (edit_manifest("target", "parts", value=[]), "an entry is missing or malformed"),
    "a part less": (edit_manifest("target", "parts", "embed", value={"sha256": "", "arrays": {}}), "disagree on embed"),
    "other shape": (
        edit_manifest("target", "parts", "embed", "arrays", "embed", "shape", 0, value=17),
        "disagree on embed",
    ),
    "other dtype": (edit_manifest("dtype", value="bfloat16"), "disagree on embed"),
    "no dtype": (edit_manifest("dtype", value="int8"), "dtype int8 is not one of"),
    "other kind": (edit_manifest("draft", "kind", value="eagle1"), "disagree on"),
    "unknown kind": (edit_manifest("draft", "kind", value="hydra"), "unknown kind of model 'hydra'"),
    "no heads": (edit_manifest("draft", "kind", value="medusa"), r"a Medusa head's lm_head.*\[V, H\], here it is \[\]"),
    "whole model": (edit_manifest("draft", "kind", value="llama"), "disagree on"),
    "no shape": (edit_manifest("draft", "parts", "rest", "arrays", "norm", value={}), "missing or malformed"),
    "own embedding": (edit_manifest("draft", "own_embedding", value=True), "disagree on embed"),
    "checksum": (edit_manifest("target", "parts", "embed", "sha256", value="0" * 64), "embed: damaged or changed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_changed_folders_do_not_load(converted: Path, damage: str):
    inflict, message = DAMAGE[damage]
    inflict(converted)
    with pytest.raises(CheckpointError, match=message) as error:
        load(converted)
    assert str(converted) in str(error.value) or damage == "no dtype"


lm_head = ("draft", "parts", "heads.0", "arrays", "heads.0.lm_head", "shape")
MEDUSA_DAMAGE = {
    "head missing": (lambda f: shutil.rmtree(part("draft", "heads.1")(f)), "heads.1: this part is missing"),
    "head flipped": (lambda f: flip(largest(part("draft", "heads.1")(f)), -1), "heads.1: damaged or changed"),
    "part less": (edit_manifest("draft", "parts", "heads.1", value={"sha256": "", "arrays": {}}), "disagree on heads"),
    "other vocabulary": (edit_manifest(*lm_head, 0, value=17), "disagree on heads.1.lm_head, heads.2.lm_head"),
    "flat": (edit_manifest(*lm_head, value=[128]), r"a Medusa head's lm_head.*here it is \[128\]"),
    "no number": (edit_manifest(*lm_head, 0, value="16"), r"a Medusa head's lm_head.*here it is \['16', 8\]"),
}


@pytest.fixture(scope="module")
def pristine_medusa(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("medusa")
    return convert(sources[0], folders.write_medusa(root / "heads", folders.medusa_arrays()), root / "out")


@pytest.mark.parametrize("damage", MEDUSA_DAMAGE)
def test_changed_folders_of_medusa_heads_do_not_load(pristine_medusa: Path, tmp_path: Path, damage: str):
    inflict, message = MEDUSA_DAMAGE[damage]
    folder = Path(shutil.copytree(pristine_medusa, tmp_path / "out"))
    inflict(folder)
    with pytest.raises(CheckpointError, match=f"{folder}.*{message}"):
        load(folder)


def test_other_folders_do_not_load(sources: tuple[Path, Path], tmp_path: Path):
    for folder in (sources[0], tmp_path, tmp_path / "absent"):
        message = "no such folder" if folder.name == "absent" else "not a converted folder.*from_pretrained"
        with pytest.raises(CheckpointError, match=f"{folder}: {message}"):
            load(folder)


def test_a_moved_folder_loads(converted: Path, sources: tuple[Path, Path]):
    assert_loads(converted.rename(converted.with_name("elsewhere")), sources)
