"""Training heads for targets with windows, soft caps, sinks and experts: whole runs, and the target's pass in them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Eagle3Draft, Llama, from_pretrained
from eagle_jax.models import params
from eagle_jax.models.architectures import config_of
from eagle_jax.sharding import make_mesh
from eagle_jax.train.config import MeshSettings, TrainSettings
from eagle_jax.train.loss import eagle
from eagle_jax.train.run import assemble, metrics
from eagle_jax.train.run.loop import train
from eagle_jax.train.run.precompute import precompute
from eagle_jax.train.run.save import save_target
from tests.toy import scaled
from tests.train.models import CONFIG

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
TARGETS: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "gemma2": {
        "query_pre_attn_scalar": 20,
        "sliding_window": 4,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
        "tie_word_embeddings": True,
    },
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "sliding_window": 4, "swiglu_limit": 0.5},
}
PACKED = [9, 6]
HEAD = {"draft_vocab_size": 64, "num_layers": 2, "windows": [4, None], "qk_norm": True}
STEPS = 3


def target_of(kind: str) -> Llama:
    """Makes a target with every parameter random: sinks and biases, too."""
    target = scaled(Llama(config_of(config_json(kind)), jax.random.key(0)), 6.0)
    arrays, rng = params.flatten(target), np.random.default_rng(0)
    for path, zeros in arrays.items():
        if path.endswith(("sinks", "bias")):
            arrays[path] = jnp.asarray(rng.normal(size=zeros.shape), zeros.dtype)
    return params.load(target, arrays)


def config_json(kind: str) -> dict[str, Any]:
    return CONFIG | TARGETS[kind] | {"model_type": kind, "vocab_size": 96}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Documents of random tokens."""
    root = tmp_path_factory.mktemp("targets")
    documents = np.random.default_rng(1).integers(8, 96, (12, 14)).tolist()
    (root / "data.jsonl").write_text("\n".join(json.dumps({"tokens": tokens}) for tokens in documents))
    return root


def settings_of(root: Path, kind: str, output: str, **changes: Any) -> TrainSettings:
    """Writes the target, unless it is there, and returns the settings of a run."""
    target = root / kind
    if not target.exists():
        (root / "config.json").write_text(json.dumps(config_json(kind)))
        save_target(target_of(kind), root / "config.json", target, "float32")
    data = {"train": [str(root / "data.jsonl")], "held_out": [str(root / "data.jsonl")], "row_length": 32}
    values: dict[str, Any] = dict(
        kind="eagle3",
        target=str(target),
        output=str(root / f"{kind}-{output}"),
        data=data,
        head=HEAD,
        loss={"steps": 2},
        optimizer={"learning_rate": 1e-3, "schedule": "constant"},
        batch_tokens=128,
        steps=STEPS,
        dtype="float32",
        save_dtype="float32",
        save_format="speculators",
        evaluation={"every": 2, "prompts": 2, "prompt_tokens": 4, "new_tokens": 8, "tree": "chain:2"},
        log_every=1,
    )
    return TrainSettings(**values | changes)


def quiet(message: str) -> None:
    del message


def lines_of(settings: TrainSettings) -> list[dict[str, Any]]:
    """Trains, with evaluations that find no wrong text, and returns the metrics of single steps without the speed."""
    assert train(settings, quiet) == 0
    lines = metrics.read(Path(settings.output) / "metrics.jsonl")
    assert [line["step"] for line in lines if "tokens_a_cycle" in line] == [2, STEPS]
    return [{name: line[name] for name in line.keys() - {"tokens_a_second", "loss_mean"}} for line in lines]


def losses(settings: TrainSettings) -> list[float]:
    lines = lines_of(settings)
    return [line[name] for line in lines for name in ("loss", "held_out_loss") if name in line]


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_the_target_reads_packed_documents_as_it_reads_each_alone(kind):
    """Its windows count from a document's beginning, and its sinks and caps hold in training's attention."""
    target = target_of(kind)
    settings = TrainSettings(kind="eagle3", target="", output="", data={"train": [""]}, head=HEAD, steps=1)
    head = Eagle3Draft(assemble.head_config(settings, target.config), 3, jax.random.key(1))
    lengths, rng = np.array(PACKED, np.int32), np.random.default_rng(2)
    alone = rng.integers(8, 96, (len(PACKED), max(PACKED))).astype(np.int32)
    packed = np.concatenate([row[:length] for row, length in zip(alone, lengths, strict=True)])[None]
    documents = np.repeat(np.arange(len(PACKED), dtype=np.int32), lengths)[None]

    @jax.jit
    def both(target, head, packed, documents, alone, lengths):
        made = eagle.examples(head, target, packed, lengths.sum(keepdims=True), jnp.ones(packed.shape), documents)
        return (target.logits(made.answers), made.features), eagle_jax.forward(target, alone, lengths, head)

    for ours, theirs in zip(*both(target, head, packed, documents, alone, lengths), strict=True):
        theirs = np.concatenate([row[:length] for row, length in zip(theirs, lengths, strict=True)])
        np.testing.assert_allclose(ours[0], theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_a_run_that_was_interrupted_is_the_same_bit_for_bit(root, kind):
    straight, halves = settings_of(root, kind, "straight"), settings_of(root, kind, "halves")
    expected = lines_of(straight)

    def interrupt(message: str) -> None:
        if "step 1/" in message:
            signal.raise_signal(signal.SIGTERM)

    assert train(halves, interrupt) == 143
    assert lines_of(halves) == expected
    assert len({line["loss"] for line in expected if "loss" in line}) == STEPS
    (target, head), (_, uninterrupted) = (
        from_pretrained(run.target, Path(run.output) / "final") for run in (halves, straight)
    )
    for path, array in params.flatten(uninterrupted).items():
        np.testing.assert_array_equal(params.flatten(head)[path], array, err_msg=path)
    assert target.config == target_of(kind).config
    assert (head.config.num_layers, head.config.windows, head.config.qk_norm) == (2, (4, None), True)


def test_devices_that_share_experts_are_further_apart_than_those_that_share_a_product():
    """The last axis changes fastest, and so do tensor's devices: in training as in decoding."""
    mesh = make_mesh(MeshSettings(tensor=2, expert=2, data=2).model_dump())
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_mesh_that_splits_the_experts_trains_what_one_device_does(root, kind):
    expected = losses(settings_of(root, kind, "one"))
    mesh = {"data": 2, "expert": 2}
    many = settings_of(root, kind, "many", mesh=mesh)
    spread = assemble.load_target(many, make_mesh(many.mesh.model_dump()))
    assert spread.layers[1].mlp.experts.gate.addressable_shards[0].data.shape[0] == 2
    np.testing.assert_allclose(losses(many), expected, rtol=2e-5)
    features = root / f"{kind}-features"
    assert precompute(settings_of(root, kind, "features-run", mesh=mesh), features, quiet) == 0
    read = settings_of(root, kind, "read", features=str(features))
    np.testing.assert_allclose(losses(read), expected, rtol=2e-5)
    _, head = from_pretrained(read.target, Path(read.output) / "final")
    assert (head.config.num_layers, head.config.windows, head.config.qk_norm) == (2, (4, None), True)
