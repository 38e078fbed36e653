"""Shapes in signatures: tests check them, and an axis has one name wherever it is."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from eagle_jax.tree import Tree, accept_sampling
from tests.array_types import ROOMS, check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


def test_a_wrong_shape_is_caught():
    tree = Tree.root(jnp.array([3, 5]))
    accept_sampling(tree, jnp.full((2, 1, 7), 1 / 7), jnp.zeros((2, 0)))
    with pytest.raises(jaxtyping.TypeCheckError, match="'uniforms'"):
        accept_sampling(tree, jnp.full((2, 1, 7), 1 / 7), jnp.zeros((2, 1)))  # one for a node, of which there is none
    with pytest.raises(jaxtyping.TypeCheckError, match="'probs'"):
        jax.eval_shape(accept_sampling, tree, jnp.full((2, 7), 1 / 7), jnp.zeros((2, 0)))


def test_a_wrong_result_is_caught():
    @jaxtyping.jaxtyped(typechecker=check)
    def rest(x: jaxtyping.Float[jax.Array, " entries"]) -> jaxtyping.Float[jax.Array, " entries"]:
        return x[1:]

    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        rest(jnp.zeros(3))


def test_a_pytree_may_hold_anything():
    tree = Tree.root(jnp.array([3, 5]))
    assert jax.tree.map(jnp.shape, tree) == Tree((2, 1), (2, 1), (2, 1), (2, 1))


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_of_a_room_is_checked(room):
    # The hook imports jaxtyping by this name. Bytecode from before a room was listed lacks it: delete __pycache__.
    folder = getattr(importlib.import_module(room), "__path__", None)
    below = pkgutil.walk_packages(folder, f"{room}.") if folder else ()
    files = [file.name for file in below if not file.ispkg] or [room]
    assert [file for file in files if not hasattr(importlib.import_module(file), "jaxtyping")] == []


def test_axes_of_several_rooms_are_those_of_the_page():
    rooms = defaultdict(set)
    for file in sorted((ROOT / "eagle_jax").rglob("*.py")):
        for axis in axes(file.read_text(encoding="utf-8")):
            rooms[axis].add(file.relative_to(ROOT / "eagle_jax").parts[0])
    table = PAGE.read_text(encoding="utf-8").partition("## Axes")[2].partition("\n## ")[0]
    named = {name for cell in re.findall(r"^\| (`.*?`) \|", table, re.M) for name in re.findall(r"`(\w+)`", cell)}
    assert sorted({axis for axis in rooms if len(rooms[axis]) > 1} - named) == [], f"not in {PAGE}"
    assert sorted(named - rooms.keys()) == [], f"in {PAGE} alone"


def axes(text: str) -> Iterator[str]:
    """The axes named by annotations such as Float[Array, "batch nodes"]."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
            shape, dtype = node.slice.elts[1], ast.unparse(node.value)
            if hasattr(jaxtyping, dtype) and isinstance(shape, ast.Constant) and isinstance(shape.value, str):
                fixed = re.sub(r"\{.*?\}|\*\w+", "", shape.value)  # without sizes computed, and "*axes"
                yield from re.findall(r"[a-z_]+", fixed)
