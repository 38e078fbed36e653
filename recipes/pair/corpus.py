"""The corpus of the embedded pair: functions and classes of the Python standard library's own source.

    python recipes/pair/corpus.py OUT

Writes OUT/train.jsonl and OUT/held_out.jsonl, {"text": ...} a line, OUT/tokenizer/, a byte-level BPE trained on the
first, and OUT/prompts.jsonl, beginnings of some held-out texts, to measure with (those of Python 3.11 lie beside this
script). Every machine that runs Python has
this source; it is under the PSF licence. A file is held out as a whole, by its name, so that both parts stay what they
are from run to run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo"}
SHORTEST, LONGEST = 80, 2400  # characters of a document
HELD_OUT = 0.04  # share of the files
VOCABULARY = 2048
PROMPTS, PROMPT_CHARACTERS = 24, 80


def main(out: Path) -> None:
    source = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, list[str]] = {"train": [], "held_out": []}
    seen, files = set(), 0
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).as_posix()
        if LEFT_OUT.intersection(Path(name).parts):
            continue
        files += 1
        part = "held_out" if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < HELD_OUT * 2**32 else "train"
        for text in pieces(path):
            if SHORTEST <= len(text) <= LONGEST and text not in seen:
                seen.add(text)
                documents[part].append(text)
    out.mkdir(parents=True, exist_ok=True)
    for part, texts in documents.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (out / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{part}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.2f} M characters")
    print(f"of {files} files of Python {sys.version.split()[0]}")
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in beginnings(documents["held_out"]))
    (out / "prompts.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer(documents["train"], out / "tokenizer")


def pieces(path: Path) -> Iterator[str]:
    """Functions, methods, and classes that are not too long, of a file, moved to the left margin."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = text.split("\n")

    def source(node: ast.stmt) -> str:
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n"

    def within(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield source(node)
            elif isinstance(node, ast.ClassDef):
                whole = source(node)
                if len(whole) <= LONGEST:
                    yield whole
                else:
                    yield from within(node.body)
            elif isinstance(node, ast.If | ast.Try):
                yield from within(node.body)

    yield from within(tree.body)


def beginnings(texts: list[str]) -> list[str]:
    """Of texts that go on for at least as long again, taken at even distances."""
    long = [text for text in texts if len(text) >= 2 * PROMPT_CHARACTERS]
    return [text[:PROMPT_CHARACTERS] for text in long[:: max(len(long) // PROMPTS, 1)][:PROMPTS]]


def train_tokenizer(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    wrapped.save_pretrained(folder)
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    print(f"tokenizer: {tokenizer.get_vocab_size()} entries; {tokens / 1e6:.2f} M tokens to train on")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
