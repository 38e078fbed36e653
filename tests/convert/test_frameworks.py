"""export --list: the table of frameworks is complete, its formats exist, and the docs show the same table."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle_jax.cli import main
from eagle_jax.convert.block_engines import BLOCK_ENGINES
from eagle_jax.convert.engines import ENGINES
from eagle_jax.convert.frameworks import FRAMEWORKS, markdown

CARD = (
    "AMD ROCm",
    "AngelSlim",
    "AWS NeuronX Distributed Core",
    "CPM.cu",
    "Intel® Extension for Transformers",
    "Intel® LLM Library for PyTorch",
    "MLC-LLM",
    "NVIDIA NeMo Framework",
    "NVIDIA TensorRT-LLM",
    "NVIDIA TensorRT Model Optimizer",
    "PaddleNLP",
    "SGLang",
    "SpecForge",
    "vLLM",
)


def test_the_fourteen_of_the_model_card_by_their_own_names():
    assert tuple(one.name for one in FRAMEWORKS if one.card) == CARD


def test_every_format_brings_a_head_to_its_framework():
    assert {name for one in FRAMEWORKS for name in one.formats} == ENGINES.keys() | BLOCK_ENGINES.keys()
    own = [one.formats[0] for one in FRAMEWORKS if one.formats and one.direct]
    assert sorted(own) == sorted(ENGINES.keys() | BLOCK_ENGINES.keys())


def test_the_docs_show_the_same_table():
    """Renew with: python -c "from eagle_jax.convert.frameworks import markdown; print(markdown())"."""
    assert markdown() in (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(["export", "--list"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in printed for name in CARD)
    assert "--format trtllm" in printed and "PaddleNLP" in printed
