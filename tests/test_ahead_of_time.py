"""Programs kept: exported to a file with jax.export, and the compilation cache of the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

import eagle_jax
from eagle_jax import TreeConfig
from eagle_jax.cli import compilation_cache
from eagle_jax.models import params

TREE = TreeConfig(3, 2, 6)


def test_an_exported_program_generates_what_the_library_does(golden, tmp_path):
    """As docs/ahead_of_time.md has it: weights are arguments, so the file holds the program alone."""
    target, draft = eagle_jax.from_pretrained(
        golden / "weights/t1_target", golden / "weights/t1_eagle3_dv96", dtype="float32"
    )

    @jax.jit
    def program(target_arrays, draft_arrays, tokens, lengths):
        out = eagle_jax.generate(
            params.load(target, target_arrays),
            params.load(draft, draft_arrays),
            tokens,
            lengths,
            tree=TREE,
            max_new_tokens=12,
        )
        return {"tokens": out.tokens, "lengths": out.lengths}

    arrays = params.flatten(target), params.flatten(draft)
    tokens, lengths = eagle_jax.pad([list(b"import os\n")])
    exported = export.export(program, platforms=["cpu", "cuda", "tpu"])(*arrays, tokens, lengths)
    path = tmp_path / "generate.bin"
    path.write_bytes(exported.serialize())
    assert path.stat().st_size < 2**21  # no weights

    out = export.deserialize(bytearray(path.read_bytes())).call(*arrays, tokens, lengths)
    own = eagle_jax.generate(target, draft, tokens, lengths, tree=TREE, max_new_tokens=12)
    np.testing.assert_array_equal(out["tokens"], own.tokens)
    np.testing.assert_array_equal(out["lengths"], own.lengths)


@pytest.fixture
def no_cache():
    """JAX without a compilation cache, as at a user's first start."""
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_command_line_keeps_programs_where_the_user_says(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EAGLE_JAX_CACHE", "off")
    compilation_cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("EAGLE_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "eagle_jax" / "xla")
    monkeypatch.setenv("EAGLE_JAX_CACHE", str(tmp_path / "other"))
    compilation_cache.keep_programs()  # it is set up already
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "eagle_jax" / "xla")


def test_a_second_start_compiles_nothing_anew(golden, tmp_path):
    command = [sys.executable, "-m", "eagle_jax", "generate", "--target", str(golden / "weights/t1_target")]
    command += ["--draft", str(golden / "weights/t1_eagle3_dv96"), "--dtype", "float32", "--tree", "2,2,4"]
    command += ["--prompts", str(golden / "parity_prompts.jsonl"), "--batch", "1", "--max-new-tokens", "4"]
    environment = os.environ | {"EAGLE_JAX_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def kept(out):
        out = ["--out", str(tmp_path / out)]
        subprocess.run([*command, *out], env=environment, check=True, capture_output=True)
        return {path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")}

    first = kept("first.jsonl")
    assert any("advance" in name for name in first)
    assert kept("second.jsonl") == first
