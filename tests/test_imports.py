"""Importing is light: what the package's parts must not import before it is used. One process tells of all."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "orbax", "safetensors", "huggingface_hub", "rich", "tensorstore", "jinja2"}
# In this order: a later part may import what an earlier one may not, never the other way round.
NOT_BY = {
    "eagle_jax": HEAVY,
    "eagle_jax.convert": HEAVY,
    "eagle_jax.train.data.records": {"torch", "transformers", "jinja2"},
}

CODE = """
import importlib, json, sys
import flax.nnx, jax
before, imported = set(sys.modules), {}
for part in sys.argv[1:]:
    importlib.import_module(part)
    imported[part] = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps(imported))
"""


def test_no_part_imports_what_only_its_use_needs():
    command = [sys.executable, "-c", CODE, *NOT_BY]
    imported = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert "eagle_jax" in imported["eagle_jax"]
    assert {part: NOT_BY[part] & set(names) for part, names in imported.items()} == {part: set() for part in NOT_BY}
