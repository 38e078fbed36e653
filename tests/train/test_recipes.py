"""The recipes: their settings are settings, and their scripts do what they say."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from eagle_jax.train.config import read_settings

RECIPE = Path(__file__).parents[2] / "recipes" / "pair"
SMOLLM2 = RECIPE.with_name("smollm2")
PAIR = Path(__file__).parents[2] / "eagle_jax" / "pair"


def script(name: str, recipe: Path = RECIPE):
    spec = importlib.util.spec_from_file_location(name, recipe / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["target", "ends", "eagle3", "eagle31", "eagle1", "dflash", "p_eagle"])
def test_settings(name):
    settings = read_settings(RECIPE / f"{name}.yaml")
    assert settings.kind == {"ends": "target", "eagle31": "eagle3", "p_eagle": "peagle"}.get(name, name)
    assert subprocess.run(["sh", "-n", str(RECIPE / "make.sh")], check=False).returncode == 0


def test_the_settings_in_the_docs(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (RECIPE.parents[1] / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(block)
    assert read_settings(tmp_path / "run.yaml").kind == "eagle3"


@pytest.mark.parametrize("recipe", [RECIPE, SMOLLM2])
def test_heads_have_the_same_budget(recipe: Path):
    """The same updates from the same tokens, at a learning rate of its own: at EAGLE-3's first one EAGLE-1 diverged."""
    heads = [read_settings(recipe / f"{name}.yaml") for name in ("eagle3", "eagle1", "dflash")]
    assert [s.kind for s in heads] == ["eagle3", "eagle1", "dflash"]
    heads += [read_settings(path) for path in [recipe / "p_eagle.yaml"] if recipe == RECIPE]
    assert subprocess.run(["sh", "-n", str(recipe / "make.sh")], check=False).returncode == 0
    same = [(s.steps, s.epochs, s.batch_tokens, s.data, s.target, s.seed) for s in heads]
    assert all(other == same[0] for other in same)
    optimizers = [s.optimizer.model_copy(update={"learning_rate": 1.0}) for s in heads]
    assert all(other == optimizers[0] for other in optimizers)


def test_eagle31_differs_from_eagle3_by_its_norms_alone():
    plain, normed = (read_settings(RECIPE / f"{name}.yaml").model_dump() for name in ("eagle3", "eagle31"))
    assert normed["head"] == plain["head"] | {"fc_norm": True, "norm_output": True}
    own = {"head", "output", "save_format"}
    assert {name: normed[name] for name in normed if name not in own} == {
        name: plain[name] for name in plain if name not in own
    }


def test_texts_end_where_they_repeat_themselves(tmp_path):
    ends = script("ends")
    assert ends.repeats(list(range(30))) is None
    assert ends.repeats([*range(12), *range(2, 12)]) == 12
    prompt, new = [40, 41], list(range(10, 22))
    texts = [
        {"tokens": prompt + new + new, "loss_mask": [0, 0] + [1] * 24},  # a loop
        {"tokens": [*prompt, *new, ends.END], "loss_mask": [0, 0] + [1] * 13},  # an end
        {"tokens": prompt + new, "loss_mask": [0, 0] + [1] * 12},  # neither
        {"tokens": prompt + [7] * 20, "loss_mask": [0, 0] + [1] * 20},  # nothing but a loop
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    ends.main(tmp_path / "in.jsonl", tmp_path / "corpus.jsonl", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    whole = {"tokens": [*prompt, *new, ends.END], "loss_mask": [0, 0] + [1] * 13}
    assert lines == [whole, whole, {"text": "b"}]
    ends.main(tmp_path / "in.jsonl", tmp_path / "corpus.jsonl", tmp_path / "end.jsonl", end_only=True)
    lines = [json.loads(line) for line in (tmp_path / "end.jsonl").read_text().splitlines()]
    assert lines[:2] == [whole | {"loss_mask": [0] * 14 + [1]}] * 2


def test_the_corpus_is_functions_and_classes(tmp_path):
    source = "import os\n\nX = 1\n\n@cache\ndef f(a):\n    return a\n\n\nclass A:\n    def g(self):\n        pass\n"
    (tmp_path / "a.py").write_text(source)
    pieces = list(script("corpus").pieces(tmp_path / "a.py"))
    assert pieces == ["@cache\ndef f(a):\n    return a\n", "class A:\n    def g(self):\n        pass\n"]
    (tmp_path / "b.py").write_text("def f(:\n")
    assert list(script("corpus").pieces(tmp_path / "b.py")) == []


def test_prompts_are_beginnings_at_even_distances():
    corpus = script("corpus")
    texts = [f"{number:02d}" * 80 for number in range(50)] + ["too short to go on" * 5]
    assert corpus.beginnings(texts) == [text[:80] for text in texts[:48:2]]
    lines = (RECIPE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 24 and {len(json.loads(line)["prompt"]) for line in lines} == {80}


def test_the_embedded_pair_is_small():
    assert sum(path.stat().st_size for path in PAIR.rglob("*") if path.is_file()) <= 14e6


@pytest.fixture
def smollm2(monkeypatch):
    monkeypatch.syspath_prepend(SMOLLM2)
    monkeypatch.delitem(sys.modules, "topics", raising=False)
    return script("prompts", SMOLLM2)


def test_prompts_of_smollm2_are_filled_templates(smollm2, tmp_path, monkeypatch):
    documented = textwrap.dedent(
        '''
        def rotate(items, count=1):
            """Return the items, rotated to the left by so many places."""
            count %= max(len(items), 1)
            return items[count:] + items[:count]
        '''
    )
    (tmp_path / "a.py").write_text(documented + "def short():\n    pass\n")
    (tmp_path / "b.py").write_text("def f(:\n")
    functions, paragraphs = smollm2.material(tmp_path)
    (only,) = (found for found, _ in functions)
    assert (only["name"], only["signature"]) == ("rotate", "rotate(items, count=1)") and paragraphs == []
    assert only["source"] == documented[1:] and only["head"].endswith('places."""')
    rng, templates = random.Random(0), [*smollm2.LIST]
    topics = sys.modules["topics"]
    templates += [entry for text in (topics.SUMS, topics.CHATS) for entry in topics.words(text)]
    for template in templates:
        prompt, held_out = smollm2.of_words(rng, template)
        assert not set("{}|") & set(prompt) and held_out == smollm2.is_held_out(prompt)
    counts = iter(range(100))
    made = list(smollm2.some(lambda: (f"is {next(counts) // 2}", False), 5, {"is 1"}, {"2"}))
    assert [prompt for prompt, _ in made] == ["is 0", "is 3", "is 4", "is 5", "is 6"], "each once, and none forbidden"
