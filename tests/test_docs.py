"""The code in README.md and docs/ runs, and does what the text around it says."""

from __future__ import annotations

import ast
import queue
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import DraftModel, SamplingConfig, TreeConfig, cli, testing
from eagle_jax.models.architectures import ARCHITECTURES
from eagle_jax.serving import Request
from eagle_jax.testing import toy_draft, toy_target
from tests.test_import_rules import FLOORS
from tests.test_public_api import parser_of
from tests.toy import random_eagle3, random_target, rows_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(path: Path, language: str = "python") -> list[str]:
    """The blocks of a page that name this language; "" for those that name none."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in fences if name == language]


CARDS = [ROOT / "eagle_jax" / "pair" / "README.md", *sorted(ROOT.glob("recipes/*/README.md"))]
EVERY_PAGE = [ROOT / "README.md", *CARDS, *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("guides/*.md"))]
PAGES = [path for path in EVERY_PAGE if blocks(path)]


VOCAB = 13


class ToyTokenizer:
    """Letters; the end of the text is a token that the toy target soon chooses."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return messages[0]["content"]

    def decode(self, ids, **options):
        return "".join(chr(ord("a") + int(id)) for id in ids)


class EaModel:
    """In place of the official decoder's: takes the arguments of its loader, and looks for the files that it reads."""

    @classmethod
    def from_pretrained(cls, use_eagle3, base_model_path, ea_model_path):
        files = {path.name for path in Path(ea_model_path).iterdir()}
        assert use_eagle3 and "config.json" in files and files & {"pytorch_model.bin", "model.safetensors"}
        return cls()


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Has pages load toy models and a toy tokenizer, and write to a folder of their own.

    A page that loads "pair/" has the embedded pair itself: engines read no heads of targets with two layers.
    """
    pair, from_pretrained = ROOT / "eagle_jax" / "pair", eagle_jax.from_pretrained
    monkeypatch.setitem(testing.SIZES, "max_position_embeddings", 1024)
    target = toy_target(vocab_size=VOCAB)
    draft = toy_draft(target)
    small = DraftModel(toy_target(seed=1, vocab_size=VOCAB))

    def load(folder, mesh=None):
        return from_pretrained(pair / "target", pair / "head") if folder == "pair/" else (target, draft)

    monkeypatch.setattr(eagle_jax, "load", load)
    monkeypatch.setattr(eagle_jax, "from_pretrained", lambda base, named, head=None: (target, draft))
    monkeypatch.setattr(eagle_jax, "load_draft", lambda folder, target: small)
    monkeypatch.setattr(eagle_jax, "tokenizer", lambda folder: ToyTokenizer())
    monkeypatch.setattr(jax.distributed, "initialize", mock.create_autospec(jax.distributed.initialize))
    official = ModuleType("eagle.model.ea_model")
    official.EaModel = EaModel
    for name in ("eagle", "eagle.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, official.__name__, official)
    monkeypatch.setitem(ARCHITECTURES, "normed_llama", None)  # a page's own, removed after it
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_block_runs(page, toys):
    names: dict = {}
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), names)


def test_no_python_hides_in_a_block_that_does_not_say_so():
    hidden = []
    for page in EVERY_PAGE:
        for code in blocks(page, ""):
            try:
                nodes = list(ast.walk(ast.parse(code)))
            except SyntaxError:
                continue
            if any(isinstance(node, ast.Call | ast.Import | ast.ImportFrom | ast.Assign) for node in nodes):
                hidden.append((page.name, code))
    assert hidden == []


@pytest.fixture(scope="module")
def serving():
    """The names that docs/serving.md's code defines, and its batch for a toy pair."""
    names: dict = {}
    for code in blocks(DOCS / "serving.md"):
        exec(compile(code, "serving.md", "exec"), names)
    return SimpleNamespace(**names), names["start"](*PAIR)


PAIR = random_target(0, scale=6.0), random_eagle3(1, scale=6.0)
PROMPTS = [np.random.default_rng(0).integers(0, 97, size).tolist() for size in (5, 33, 1, 16, 60, 9)]


def texts(prompts, keys, temperatures, max_new_tokens: int) -> list[list[int]]:
    """What `generate` gives, by one program."""
    fill = len(PROMPTS) - len(prompts)
    prompts, keys = [*prompts, *[[1]] * fill], [*keys, *keys[:1] * fill]
    tokens, lengths = eagle_jax.pad(prompts, buckets=(128,))
    out = eagle_jax.generate(
        *PAIR,
        tokens,
        lengths,
        jnp.stack(keys),
        tree=TreeConfig(depth=3, top_k=2, num_nodes=6),
        sampling=SamplingConfig(np.array([*temperatures, *[1.0] * fill], np.float32)),
        max_new_tokens=20,
    )
    rows = zip(prompts, rows_of(out), strict=True)
    return [text[: len(prompt) + max_new_tokens] for prompt, text in rows][: len(prompts) - fill]


def test_a_service_has_the_texts_of_generate(serving):
    code, batch = serving
    answers = code.answer_all(batch, PROMPTS)
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(len(PROMPTS))]
    expected = texts(PROMPTS, keys, [0.8 * (number % 2) for number in range(len(PROMPTS))], 20)
    assert [[*prompt, *answers[number]] for number, prompt in enumerate(PROMPTS)] == expected

    waiting, finished, streamed = queue.Queue(), [], {number: [] for number in range(len(PROMPTS))}
    for number, prompt in enumerate(PROMPTS):
        send = streamed[number].extend
        waiting.put(Request(prompt, keys[number], 20, SamplingConfig(0.8 * (number % 2)), on_tokens=send, id=number))
    waiting.put(None)
    code.serve_queue(batch, waiting, finished.append)
    assert {answer.request.id: answer.tokens for answer in finished} == answers == streamed


def test_conversations_side_by_side(serving):
    code, batch = serving
    turns = [[PROMPTS[0], PROMPTS[2]], [PROMPTS[3]], [PROMPTS[5], PROMPTS[2], PROMPTS[0]]]
    expected = [[] for _ in turns]
    for number in range(3):
        going = [index for index, said in enumerate(turns) if number < len(said)]
        prompts = [[*expected[index], *turns[index][number]] for index in going]
        key = jax.random.fold_in(jax.random.key(7), number)
        for index, text in zip(going, texts(prompts, [key] * len(going), [1.0] * len(going), 8), strict=True):
            expected[index] = text
    assert sorted(code.talk(batch, turns)) == sorted(expected)


def test_the_toy_draft_is_the_one_that_the_tests_run():
    toy = (ROOT / "tests" / "drafts" / "successors.py").read_text()
    assert blocks(DOCS / "guides" / "draft.md")[0] == toy.split('"""\n\n', 1)[1]


@pytest.mark.parametrize("page", ["acceptance_rule", "tree", "draft", "target"])
def test_one_of_your_own_takes_a_file_of_40_lines(page):
    assert len(blocks(DOCS / "guides" / f"{page}.md")[0].splitlines()) <= 40


def test_every_command_parses():
    parser, seen = parser_of(cli.main), 0
    for page in EVERY_PAGE:
        for line in "".join(blocks(page, "")).replace("\\\n", " ").splitlines():
            command = re.match(r"(?:time |\w+=\S+ )*eagle-jax (.*)", line.split(" < ")[0])
            if command:
                words = shlex.split(command[1].replace("train regenerate", "'train regenerate'"), comments=True)
                parser.parse_args(words)
                seen += 1
    assert seen > 30


def test_every_file_and_module_that_a_page_names_is_there():
    missing = []
    for page in EVERY_PAGE:
        text = page.read_text()
        files = set(re.findall(r"`((?:eagle_jax|bench|tests|recipes)/[\w/]+(?:\.\w+|/))`", text))
        modules = set(re.findall(r"python -m ((?:eagle_jax|bench|tests|docs)[\w.]*)", text))
        files |= {f"{name.replace('.', '/')}.py" for name in modules if not (ROOT / name.replace(".", "/")).is_dir()}
        missing += [(page.name, name) for name in sorted(files) if not (ROOT / name).exists()]
    assert missing == []


def test_the_architecture_page_has_the_rooms_and_files_as_they_are():
    text = (DOCS / "architecture.md").read_text()
    floors = defaultdict(set)
    for floor, rooms in re.findall(r"^\| (\d) \| (.*?) \|", text, flags=re.MULTILINE):
        floors[int(floor)] |= {room.removesuffix(".py") for room in re.findall(r"`([\w.]+)/?`", rooms)}
    assert [floors[floor] for floor in sorted(floors)] == list(FLOORS)
    named = set(re.findall(r"`([a-z]\w+/[\w/]+\.py)`", text))
    assert "tree/accept.py" in named
    here = {name for name in named if (ROOT / name).exists() or (ROOT / "eagle_jax" / name).exists()}
    assert named - here == set()
