"""Which layers a head reads, and why; choices come first, and a converted folder keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagle_jax.convert import HeadChoices, convert, from_pretrained, load, to_official
from eagle_jax.convert.__main__ import main
from eagle_jax.convert.error import CheckpointError
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG
from tests.convert.heads import peagle
from tests.convert.reading import EAGLE1_CONFIG, MAY_BE_EITHER, OUTPUTS, SPECULATORS, TAPS, read, taps

# Ids of tapped layers: the config's fields, the layers of the target, the layers whose input is read, and why.
CONVENTIONS: dict[str, tuple[dict[str, Any], int, tuple[int, ...], str]] = {
    "none": ({}, 32, (2, 16, 29), "names no layers, so they are the official ones"),
    "eagle_config from 1": (OUTPUTS, 8, (2, 5, 7), "names outputs: it begins with 1"),
    "eagle_config from 0": ({"eagle_config": {TAPS: [0, 3, 6]}}, 8, (1, 4, 7), "names outputs: it begins with 0"),
    "the official inputs in eagle_config": ({"eagle_config": {TAPS: [2, 16, 29]}}, 32, (2, 16, 29), "names inputs"),
    "after the last layer": ({"eagle_config": {TAPS: [3, 18, 36]}}, 36, (3, 18, 36), "has no layer 36"),
    "target_layer_ids": ({"target_layer_ids": [3, 4, 6]}, 8, (4, 5, 7), "target_layer_ids does in every framework"),
    "at the top level": ({TAPS: [1, 4, 7]}, 8, (1, 4, 7), "at the top level, as vLLM reads it"),
    "speculators": (SPECULATORS | {TAPS: [1, 4, 7]}, 8, (1, 4, 7), "speculators writes it so"),
    "two fields": ({TAPS: [2, 5, 7]} | OUTPUTS, 8, (2, 5, 7), "at the top level"),
    "one field tells the other": ({TAPS: [3, 5, 7]} | MAY_BE_EITHER, 8, (3, 5, 7), "at the top level"),
    "ours": ({"eagle_jax_tap_inputs": [3, 5, 7]} | MAY_BE_EITHER, 8, (3, 5, 7), "eagle_jax_tap_inputs names inputs"),
}


@pytest.mark.parametrize("case", CONVENTIONS)
def test_which_layers_are_read_and_why(case: str):
    fields, layers, expected, because = CONVENTIONS[case]
    match = read(HEAD_CONFIG | fields, folders.eagle3_arrays(), layers=layers)
    assert taps(match, layers) == expected
    reason = match.reading.reasons[TAPS]
    assert reason.startswith(f"the inputs of layers {', '.join(map(str, expected))} are read; ") and because in reason


@pytest.mark.parametrize(
    ("fields", "choice", "expected"),
    [
        (MAY_BE_EITHER, "inputs", (2, 4, 6)),
        (MAY_BE_EITHER, "outputs", (3, 5, 7)),
        (MAY_BE_EITHER, (1, 2, 3), (1, 2, 3)),
        (OUTPUTS, "inputs", (1, 4, 6)),
        ({}, (1, 2, 3), (1, 2, 3)),
    ],
)
def test_a_choice_comes_first(fields: dict[str, Any], choice: Any, expected: tuple[int, ...]):
    match = read(HEAD_CONFIG | fields, folders.eagle3_arrays(), HeadChoices(taps=choice))
    assert taps(match) == expected and "as chosen" in match.reading.reasons[TAPS]


def test_choices_settle_what_is_open():
    arrays = folders.eagle3_arrays()
    plain = read(HEAD_CONFIG | {"norm_output": True}, arrays, HeadChoices(norm_output=False))
    assert plain.model.config == read(HEAD_CONFIG, arrays).model.config
    assert plain.reading.reasons["norm_output"] == "as chosen"
    open_residual = {name: value for name, value in SPECULATORS.items() if name != "norm_before_residual"}
    for chosen in (False, True):
        match = read(HEAD_CONFIG | open_residual, arrays, HeadChoices(norm_before_residual=chosen))
        assert match.model.config.norm_before_residual is chosen
    unknown = read(HEAD_CONFIG | {"residual_gate": 0.5}, arrays, HeadChoices(ignored=("residual_gate",)))
    assert unknown.model.config == read(HEAD_CONFIG, arrays).model.config
    for head in (folders.eagle1_arrays(), folders.llama_arrays(1), folders.medusa_arrays()):
        with pytest.raises(ConfigError, match="is no EAGLE-3 head"):
            read(EAGLE1_CONFIG, head, HeadChoices(taps="inputs"))


def test_what_a_p_eagle_file_lacks_is_asked_for():
    arrays = to_official(peagle(own_embedding=True))
    config = HEAD_CONFIG | {"num_hidden_layers": 2, "head_dim": 4, "pard_token": 11, "num_depths": 6}
    stated = read(config, arrays)
    for field, choices, option in (
        ("num_depths", HeadChoices(num_depths=6), "--num-depths"),
        ("pard_token", HeadChoices(mask_token=11), "--mask-token"),
    ):
        lacking = {name: value for name, value in config.items() if name != field}
        with pytest.raises(ConfigError, match=rf"is missing.*the head's training.*{option}"):
            read(lacking, arrays)
        match = read(lacking, arrays, choices)
        assert match.model.config == stated.model.config and "as chosen" in match.reading.reasons.values()
    with pytest.raises(ConfigError, match="pard_token = 11 and mask_token_id = 12 contradict"):
        read(config, arrays, HeadChoices(mask_token=12))
    with pytest.raises(ConfigError, match="is no P-EAGLE head"):
        read(HEAD_CONFIG, folders.eagle3_arrays(), HeadChoices(num_depths=6))
    for bad in ({"num_depths": 0}, {"mask_token": -1}, {"num_depths": True}):
        with pytest.raises(ValueError, match="must be an integer of at least"):
            HeadChoices(**bad)


@pytest.mark.parametrize("bad", ["input", (), (1, -1), (1.5,), [1, 2]])
def test_choices_of_no_meaning(bad: Any):
    with pytest.raises(ValueError, match="taps must be 'inputs', 'outputs' or a tuple"):
        HeadChoices(taps=bad)


def test_layers_are_counted_by_the_tensors_where_the_config_is_the_targets():
    """The official head of a 13B model says 40 layers."""
    match = read(HEAD_CONFIG | {"num_hidden_layers": 40}, folders.eagle3_arrays())
    assert match.model.config.num_layers == 1 and "40 is the target's" in match.reading.reasons["num_hidden_layers"]


def test_a_converted_folder_keeps_the_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = folders.write_safetensors(tmp_path / "target", CONFIG | {"num_hidden_layers": 8}, folders.llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", HEAD_CONFIG | MAY_BE_EITHER, folders.eagle3_arrays())
    with pytest.raises(ConfigError, match="may name layers"):
        from_pretrained(target, head)
    out = convert(target, head, tmp_path / "out", head=HeadChoices(taps="outputs"))
    assert load(out)[1].config.taps == (3, 5, 7)
    with pytest.raises(CheckpointError, match="holds another conversion"):
        convert(target, head, out, head=HeadChoices(taps="inputs"))
    convert(target, head, out, head=HeadChoices(taps="outputs"))

    options = ["--target", str(target), "--draft", str(head), "--out", str(tmp_path / "again")]
    assert main(options) == 2 and "--taps" in capsys.readouterr().err
    assert main([*options, "--taps", "3,5,x"]) == 2 and "--taps must be" in capsys.readouterr().err
    assert main([*options, "--taps", "3, 5, 7"]) == 0
    assert "taps: the inputs of layers 3, 5, 7 are read; as chosen" in capsys.readouterr().out
    assert load(tmp_path / "again")[1].config.taps == (3, 5, 7)


def test_folders_of_older_versions_are_read_as_they_were(tmp_path: Path):
    target = folders.write_safetensors(tmp_path / "target", CONFIG | {"num_hidden_layers": 8}, folders.llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", HEAD_CONFIG | OUTPUTS, folders.eagle3_arrays())
    out = convert(target, head, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["draft"]["reading"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert load(out)[1].config.taps == (2, 5, 7)
    convert(target, head, out)  # the same conversion
    with pytest.raises(CheckpointError, match="holds another conversion"):
        convert(target, head, out, head=HeadChoices(taps="inputs"))
