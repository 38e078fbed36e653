"""Hidden states from a file: the same training as with the live target, and no other run's or damaged ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import signal
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file

from eagle_jax import DraftModel, Eagle3Draft, Llama, SamplingConfig, TreeConfig, input_first
from eagle_jax.cli import main
from eagle_jax.convert import CheckpointError
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.files.lock import Locked, locked_folder
from eagle_jax.models.config import RopeConfig
from eagle_jax.sharding import make_mesh
from eagle_jax.train import fingerprint
from eagle_jax.train.config import TrainSettings, read_settings
from eagle_jax.train.data import features, loader
from eagle_jax.train.data.dataset import Dataset
from eagle_jax.train.data.features import FeaturesError
from eagle_jax.train.loss import eagle
from eagle_jax.train.run import assemble, metrics
from eagle_jax.train.run.assemble import objective_of, rows_of
from eagle_jax.train.run.loop import train
from eagle_jax.train.run.precompute import precompute
from tests.toy import TARGET
from tests.train.chat_templates import byte_level
from tests.train.models import VOCAB, write_target

PACKED = {"row_length": 32}
BUCKETED = {"row_length": 32, "packing": False, "buckets": [16, 32]}
OFFICIAL = {"row_length": 32, "packing": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a target and data; documents of 3 to 32 tokens, some of which fill a row."""
    folder = tmp_path_factory.mktemp("features")
    write_target(folder / "target", byte_level())
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("held_out", 9)):
        sizes = [32, 3, *rng.integers(3, 33, count - 2)]
        documents = [{"tokens": rng.integers(9, VOCAB, size).tolist()} for size in sizes]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


def write_config(place: Path, output: Path, kind: str, data: dict, /, **settings) -> Path:
    values = {
        "kind": kind,
        "target": str(place / "target"),
        "output": str(output),
        "data": {"train": [str(place / "train.jsonl")], "held_out": [str(place / "held_out.jsonl")]} | data,
        "head": {"draft_vocab_size": 64} if kind == "eagle3" else {},
        "loss": {"steps": 2},
        "optimizer": {"learning_rate": 1e-3, "clip_norm": None},
        "steps": 3,
        "batch_tokens": 128,
        "accumulation": 2,
        "dtype": "float32",
        "save_dtype": "float32",
        "evaluation": {"tree": "chain:2", "new_tokens": 3, "prompts": 1, "prompt_tokens": 2, "every": 100},
        "log_every": 1,
    } | settings
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


SHARD_BYTES = 4 * 32 * 4 * 32 * 4  # four of EAGLE-3's rows, eight of EAGLE-1's


def test_a_run_reads_its_features_from_the_file_and_is_the_same(place, tmp_path, monkeypatch):
    config = write_config(place, tmp_path / "live", "eagle3", PACKED)
    assert main(["train", "--config", str(config)]) == 0
    assert precompute(read_settings(config), tmp_path / "features", lambda _: None, SHARD_BYTES) == 0
    monkeypatch.delattr(eagle, "examples")  # the target's pass
    stored = ["train", "--config", str(config), f"features={tmp_path / 'features'}", f"output={tmp_path / 'stored'}"]
    assert main(stored) == 0
    ours, theirs = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("stored", "live"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 3]
    assert len({line["loss"] for line in ours[:3]}) == 3 and "held_out_loss" in ours[3]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_a_second"}:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5 if a["step"] > 1 else 1e-6, err_msg=name)

    # The target's layers are not read where nothing runs them.
    damaged = without_layers(place / "target", tmp_path / "damaged")
    overrides = [f"features={tmp_path / 'features'}", f"output={tmp_path / 'ends'}", f"target={damaged}"]
    with pytest.raises(CheckpointError, match=r"layers\..* holds NaN"):
        train(read_settings(config, overrides), lambda _: None)
    assert train(read_settings(config, [*overrides, "evaluation.prompts=0"]), lambda _: None) == 0
    alone = metrics.read(tmp_path / "ends" / "metrics.jsonl")
    assert [line["loss"] for line in alone[:3]] == [line["loss"] for line in ours[:3]]
    assert alone[3]["held_out_loss"] == ours[3]["held_out_loss"] and "tokens_a_cycle" not in alone[3]
    for which in ("final", "best"):
        blind, seeing = (load_file(tmp_path / name / which / "model.safetensors") for name in ("ends", "stored"))
        assert blind.keys() == seeing.keys()
        for name, array in seeing.items():
            np.testing.assert_array_equal(blind[name], array, err_msg=name)


def without_layers(target: Path, folder: Path) -> Path:
    """Copies a target with NaN in its layers, which reading refuses."""
    shutil.copytree(target, folder)
    tensors = load_file(folder / "model.safetensors")
    damaged = {name: array * np.float32("nan") if ".layers." in name else array for name, array in tensors.items()}
    save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclasses.dataclass(frozen=True)
class Case:
    """What `train` has of a run."""

    settings: TrainSettings
    target: Any
    head: Any
    splits: dict[str, tuple[Dataset, Any]]

    def stored(self, folder: Path) -> features.Features:
        return features.stored(
            self.settings.model_copy(update={"features": str(folder)}), self.head, self.target, self.splits
        )

    def batches(self, split: str, stored: features.Features | None):
        data, rows = self.splits[split]
        counts = {length: self.settings.rows(length) for length in rows}
        read = None if stored is None else functools.partial(stored.batch, split)
        return loader.batches(data, rows, counts, 0, features=read), loader.steps_of(rows, counts, 1)


def case(place: Path, config: Path) -> Case:
    settings = read_settings(config)
    mesh, origin = make_mesh(settings.mesh.model_dump()), assemble.source(settings)
    splits = {}
    for split in ("train", "held_out"):
        files = [str(place / f"{split}.jsonl")]
        data = assemble.documents(files, settings.data, origin, Path(settings.output) / "data" / split, lambda _: None)
        splits[split] = data, rows_of(data, settings)
    target = assemble.load_target(settings, mesh)
    head = assemble.new_model(settings, origin, target, splits["train"][0], lambda _: None)
    return Case(settings, target, head, splits)


@pytest.mark.parametrize(
    ("kind", "data", "settings"),
    [
        ("eagle1", BUCKETED, {}),
        ("eagle3", OFFICIAL, {"loss": {"steps": 2, "alignment": "official"}}),
    ],
    ids=["eagle1-bucketed", "eagle3-official"],
)
def test_losses_and_gradients_are_those_of_the_live_target(place, tmp_path, kind, data, settings):
    config = write_config(place, tmp_path / "run", kind, data, **settings)
    assert precompute(read_settings(config), tmp_path / "features", lambda _: None, SHARD_BYTES) == 0
    made = case(place, config)
    objective = objective_of(made.settings)

    @jax.jit
    def gradient(head, target, batch):
        prepared = objective.prepare(head, target, batch)
        counts = objective.counts(prepared)
        return jax.value_and_grad(
            lambda head: objective.sums(head, target, prepared, counts, jax.random.key(0))[0], allow_int=True
        )(head)

    stored = made.stored(tmp_path / "features")
    for split in ("train", "held_out"):
        (live, count), (read, _) = made.batches(split, None), made.batches(split, stored)
        widths = {}
        for index in range(count):  # one batch of each row length
            widths[live[index]["tokens"].shape[1]] = index
        assert len(widths) == len(made.splits[split][1])
        for index in widths.values():
            ours, theirs = (gradient(made.head, made.target, batches[index]) for batches in (read, live))
            assert "features" in read[index] and "features" not in live[index]
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                if a.dtype != jax.dtypes.float0:
                    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_bfloat16_is_stored_bit_by_bit(place, tmp_path):
    config = write_config(place, tmp_path / "run", "eagle3", PACKED, dtype="bfloat16")
    precompute(read_settings(config), tmp_path / "features", lambda _: None)
    made = case(place, config)
    batch = made.batches("train", made.stored(tmp_path / "features"))[0][0]
    expected = jax.jit(eagle.examples)(
        made.head, made.target, *(batch[name] for name in ("tokens", "lengths", "loss_mask", "documents"))
    )
    text = np.arange(32) < batch["lengths"][:, None]
    for name in ("features", "answers"):
        assert batch[name].dtype == jax.numpy.bfloat16
        ours, theirs = (np.asarray(array, np.float32)[text] for array in (batch[name], getattr(expected, name)))
        np.testing.assert_allclose(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.fixture(scope="module")
def written(place, tmp_path_factory) -> tuple[Path, Path]:
    """The settings and the features of a run, in several shards."""
    folder = tmp_path_factory.mktemp("written")
    config = write_config(place, folder / "run", "eagle3", PACKED)
    precompute(read_settings(config), folder / "features", lambda _: None, SHARD_BYTES // 2)
    return config, folder / "features"


def test_precomputing_goes_on_with_whole_shards(place, written, tmp_path):
    config, folder = written
    names = sorted(path.name for path in folder.iterdir())
    assert names[-2].startswith("train-32-") and names[0].startswith("held_out-32-") and len(names) >= 6
    ours = tmp_path / "features"
    shutil.copytree(folder, ours)
    (ours / names[-2]).unlink()
    (ours / names[1]).write_bytes(b"cut")
    before = {path.name: path.stat().st_mtime_ns for path in ours.iterdir()}
    said: list[str] = []
    precompute(read_settings(config), ours, said.append)
    after = {path.name: path.stat().st_mtime_ns for path in ours.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {names[-2], names[1], "manifest.json"}
    assert any(f"{len(names) - 1} shards, {len(names) - 3} there already" in line for line in said)
    for name in names:
        assert (ours / name).read_bytes() == (folder / name).read_bytes()


def test_ctrl_c_keeps_the_shards_that_are_written(place, written, tmp_path, monkeypatch, capsys):
    config, folder = written
    ours, synced = tmp_path / "features", []

    def sync(file: IO[bytes]) -> None:
        synced.append(file)
        if len(synced) == 3:
            signal.raise_signal(signal.SIGINT)

    # A shell's background jobs start with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        in_small_shards = functools.partial(precompute, shard_bytes=SHARD_BYTES // 2)
        patch.setattr("eagle_jax.train.run.precompute.precompute", in_small_shards)
        patch.setattr(features, "sync", sync)
        assert main(["train", "--config", str(config), "--precompute", str(ours)]) == 130
    signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert f"to go on from there: eagle-jax train --config {config} --precompute {ours}" in said
    assert len([path for path in ours.iterdir() if path.suffix == ".npy"]) == 2
    precompute(read_settings(config), ours, lambda _: None)
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_missing_damaged_and_strange_shards_are_refused(place, written, tmp_path):
    config, folder = written
    made = case(place, config)
    made.stored(folder).batch("train", 32, [0, 1])
    ours = tmp_path / "features"
    with pytest.raises(FeaturesError, match=r"there are no features.*--precompute"):
        made.stored(ours)
    shutil.copytree(folder, ours)
    shard = ours / "train-32-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    damaged = made.stored(ours)
    damaged.batch("held_out", 32, [0])
    with pytest.raises(FeaturesError, match=r"train-32-00000\.npy: this shard of the features is damaged; remove it"):
        next(iter(loader.iterator(made.batches("train", damaged)[0])))  # through the reading thread
    shard.write_bytes(content[:-1])
    with pytest.raises(FeaturesError, match=r"train-32-00000\.npy: this shard of the features is missing or cut"):
        made.stored(ours)
    shard.unlink()
    with pytest.raises(FeaturesError, match=r"train-32-00000\.npy: .*missing.*--precompute .*, which writes what is"):
        made.stored(ours)
    for content, fault in (("{", "not JSON"), ("{}", "damaged, parts of it are missing"), ("[1]", "damaged")):
        (ours / "manifest.json").write_text(content)
        with pytest.raises(FeaturesError, match=rf"manifest\.json: {fault}.*--precompute"):
            made.stored(ours)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"seed": 1}, "train rows"),
        ({"head": {"taps": [0, 1, 1]}}, "taps"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"kind": "eagle1", "seed": 1}, "train rows"),
        ("data", "train rows"),
        ("target", "target"),
    ],
    ids=["seed", "taps", "dtype", "eagle1-seed", "data", "target"],
)
def test_features_of_another_run_are_refused(place, written, tmp_path, change, differs):
    _, folder = written
    other = shutil.copytree(place, tmp_path / "place")
    if change == "data":
        lines = (other / "train.jsonl").read_text().splitlines()
        (other / "train.jsonl").write_text("\n".join(lines[::-1]))
    elif change == "target":
        tensors = load_file(other / "target" / "model.safetensors")
        tensors["model.norm.weight"][5] += 0.5
        save_file(tensors, other / "target" / "model.safetensors", metadata={"format": "pt"})
    settings = change if isinstance(change, dict) else {}
    config = write_config(other, tmp_path / "run", "eagle3", PACKED, **settings)
    with pytest.raises(FeaturesError, match=rf"features of another run \(.*{differs}.* differ\).*--precompute"):
        case(other, config).stored(folder)
    if change == "data":
        with pytest.raises(FeaturesError, match="features of another run"):
            precompute(read_settings(config), folder, lambda _: None)


def test_eagle1_reads_the_last_hidden_states_of_eagle3s_features(place, written, tmp_path):
    """EAGLE-3 reads none of EAGLE-1's, which lack its taps; writing into its folder is refused."""
    config = write_config(place, tmp_path / "run", "eagle1", PACKED)
    ours = case(place, config)
    rows = range(len(ours.splits["train"][1][32]))
    wide = case(place, written[0]).stored(written[1]).batch("train", 32, rows)
    narrow = ours.stored(written[1]).batch("train", 32, rows)
    np.testing.assert_array_equal(narrow["answers"], wide["answers"])
    np.testing.assert_array_equal(narrow["features"], wide["answers"])
    with pytest.raises(FeaturesError, match=r"another run \(taps, width differ\)"):
        precompute(read_settings(config), written[1], lambda _: None)
    assert precompute(read_settings(config), tmp_path / "own", lambda _: None) == 0
    own = ours.stored(tmp_path / "own").batch("train", 32, rows)
    np.testing.assert_allclose(own["answers"], narrow["answers"], atol=1e-6)
    with pytest.raises(FeaturesError, match="taps, width differ"):
        case(place, written[0]).stored(tmp_path / "own")


def test_a_dflash_head_reads_eagle3s_features_of_the_same_taps(place, tmp_path):
    eagle3 = write_config(place, tmp_path / "eagle3", "eagle3", PACKED, head={"taps": [1, 2, 3]})
    precompute(read_settings(eagle3), tmp_path / "features", lambda _: None)
    head = {"num_layers": 1, "block_size": 4, "mask_token_id": 0}
    for taps in ([1, 2, 3], [1, 2, 2]):
        dflash = write_config(place, tmp_path / "dflash", "dflash", PACKED, loss={}, head=head | {"taps": taps})
        if taps == [1, 2, 3]:
            stored = case(place, dflash).stored(tmp_path / "features")
            assert stored.batch("train", 32, [0])["features"].shape[-1] == stored.contents.features > 0
        else:
            with pytest.raises(FeaturesError, match=r"another run \(taps differ\)"):
                case(place, dflash).stored(tmp_path / "features")


def test_a_run_needs_the_target_s_layers_where_something_reads_them(place, written, tmp_path):
    """Otherwise it compares the weights that it has with those that the features were computed from."""
    config, folder = written
    decodes_nothing = [f"features={folder}", "evaluation.prompts=0"]
    assert not assemble.runs_target(read_settings(config, decodes_nothing))
    assert not assemble.runs_target(read_settings(config, [*decodes_nothing[:1], "data.held_out=[]"]))
    assert assemble.runs_target(read_settings(config, decodes_nothing[:1]))
    assert assemble.runs_target(read_settings(config, decodes_nothing[1:]))

    made = case(place, config)
    ends = made.target.without_layers()
    dataclasses.replace(made, target=ends).stored(folder)
    ends.norm = nnx.Param(ends.norm[...] + 1)
    with pytest.raises(FeaturesError, match=r"\(target without layers differ\)"):
        dataclasses.replace(made, target=ends).stored(folder)

    # Of an earlier version, which compared the whole target.
    older = shutil.copytree(folder, tmp_path / "older")
    manifest = json.loads((older / "manifest.json").read_text())
    del manifest["made_from"]["target without layers"]
    (older / "manifest.json").write_text(json.dumps(manifest))
    made.stored(older)
    assert assemble.runs_target(read_settings(config, [f"features={older}", *decodes_nothing[1:]]))


def test_settings_that_features_do_not_depend_on(place, written, tmp_path):
    """Batches of another size read the same shards; a target has no features."""
    config = write_config(place, tmp_path / "run", "eagle3", PACKED, batch_tokens=64, accumulation=1)
    ours, theirs = case(place, config), case(place, written[0])
    rows = range(len(ours.splits["train"][1][32]))
    for name, array in theirs.stored(written[1]).batch("train", 32, rows).items():
        np.testing.assert_array_equal(ours.stored(written[1]).batch("train", 32, rows)[name], array)
    target = {"kind": "target", "target": None, "model": str(place / "target" / "config.json")}
    with locked_folder(written[1], print), pytest.raises(Locked, match="another run writes there"):
        precompute(ours.settings, written[1], lambda _: None)
    with pytest.raises(ValueError, match="--precompute is for heads"):
        precompute(read_settings(write_config(place, tmp_path / "own", "target", PACKED, **target)), tmp_path / "no")


def test_a_model_is_known_by_every_number_and_its_place():
    def digest(**changes):
        arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)} | changes
        return fingerprint.of_model(jax.tree.map(jax.numpy.asarray, arrays))

    base = np.arange(12, dtype=np.float32)
    swapped, nudged = base.copy(), base.copy()
    swapped[[3, 7]] = swapped[[7, 3]]
    nudged[11] = np.nextafter(nudged[11], 0)
    other = [digest(a=swapped.reshape(3, 4)), digest(a=nudged.reshape(3, 4)), digest(a=base.reshape(4, 3))]
    other += [digest(b=np.ones(5, np.float32)), digest(c=np.ones(1, np.float32)), digest(b=np.ones(4, np.float16))]
    assert len({digest(), *other}) == 7 and digest() == digest(a=base.reshape(3, 4).copy())


def test_fingerprints_outlast_new_fields_of_a_config():
    """A stored one (of the version before fields were chosen) holds; a new field counts where it is not its default."""
    config = DraftConfig(8, 4, 4, 1, 2, 1, 2, rope=RopeConfig(500000.0), draft_vocab_size=8, target_hidden_size=4)
    config = dataclasses.replace(config, taps=(0, 1, 1), window=(4, 64))
    head = jax.tree.map(jax.numpy.ones_like, Eagle3Draft(config, 3, jax.random.key(0)))
    stored = "09c090041d61e02d7d82b4a82f06ae263b863a86700d777c48778ce524148b63"
    assert fingerprint.of_model(head) == stored

    newer = dataclasses.make_dataclass(
        "NewerConfig",
        [("new_factor", float, 0.0), ("new_sizes", tuple, dataclasses.field(default_factory=tuple))],
        bases=(DraftConfig,),
        frozen=True,
    )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    head.config = newer(**fields)
    assert fingerprint.of_model(head) == stored
    others = []
    for change in ({"new_factor": 1.0}, {"new_sizes": (1,)}, {"window": None}, {"rope": RopeConfig()}):
        head.config = dataclasses.replace(newer(**fields), **change)
        others.append(fingerprint.of_model(head))
    assert len({stored, *others}) == 5
    assert fingerprint.of_config(TreeConfig()) == repr(TreeConfig()) and fingerprint.of_config(None) == "None"
    sampled = SamplingConfig(temperature=0.7, coupled=True)
    assert fingerprint.of_config(sampled) == repr(sampled)


@pytest.mark.parametrize("wrap", [lambda target: target, DraftModel], ids=["target", "draft model"])
def test_the_fingerprint_of_a_tied_model_leaves_out_the_copy_that_input_first_makes(wrap):
    """Runs begun before `input_first` made that copy can still resume."""
    tied = Llama(dataclasses.replace(TARGET, tie_word_embeddings=True), jax.random.key(0))
    turned = input_first(wrap(tied))
    inner = getattr(turned, "model", turned)
    assert inner.lm_head is not None
    stored = fingerprint.of_model(turned)
    inner.lm_head = None
    assert fingerprint.of_model(turned) == stored
    inner.embed = nnx.Param(inner.embed[...] + 1)
    assert fingerprint.of_model(turned) != stored
