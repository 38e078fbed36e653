"""The code in docs/ runs, and does what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np

import eagle_jax
from eagle_jax import SamplingConfig, TreeConfig
from tests.toy import random_eagle3, random_target, rows_of

DOCS = Path(__file__).parents[1] / "docs"


def test_the_service_loop():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "serving.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "serving.md", "exec"), names)
    target, draft = random_target(0, scale=6.0), random_eagle3(1, scale=6.0)
    rng = np.random.default_rng(0)
    requests = [
        (rng.integers(0, 97, size).tolist(), jax.random.key(index), SamplingConfig(temperature), new)
        for index, (size, temperature, new) in enumerate(
            [(5, 0.0, 9), (33, 0.8, 4), (1, 1.2, 20), (16, 0.0, 1), (60, 1.0, 7), (9, 0.5, 12)]
        )
    ]
    texts = {index: (new, done) for index, new, done in names["serve"](target, draft, requests)}
    assert sorted(texts) == list(range(len(requests))) and all(done for _, done in texts.values())
    tokens, lengths = eagle_jax.pad([prompt for prompt, *_ in requests])
    temperatures = np.array([sampling.temperature for *_, sampling, _ in requests], np.float32)
    together = eagle_jax.generate(
        target,
        draft,
        tokens,
        lengths,
        jax.numpy.stack([key for _, key, *_ in requests]),
        tree=TreeConfig(depth=3, top_k=2, num_nodes=6),
        sampling=SamplingConfig(temperatures),
        max_new_tokens=20,
    )
    for index, (whole, (prompt, *_, count)) in enumerate(zip(rows_of(together), requests, strict=True)):
        assert texts[index][0] == whole[len(prompt) : len(prompt) + count]


def test_the_toy_draft_is_the_one_that_the_tests_run():
    text = (DOCS / "drafts.md").read_text()
    toy = (Path(__file__).parent / "drafts" / "successors.py").read_text()
    _, code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code == toy.split('"""\n\n', 1)[1]
    assert len(toy.splitlines()) <= 40
