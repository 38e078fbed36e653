"""Which part of the package may import which, read from the syntax trees: nothing is imported here.

A room is a folder or a file directly under eagle_jax/, or bench/. An import goes down a floor, or sideways in its own
room; one in a function, or for types alone, is an import, too. Nobody imports the commands. What broke the rules when
they were written down is listed. The lists may only shrink: an entry that no longer breaks a rule fails as well.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FACADE = "eagle_jax"

# From the lowest up.
FLOORS = (
    {"files", "sharding", "version"},
    {"ops"},
    {"tree", "models", "sampling", "keys"},
    {"drafts"},
    {"decode", "convert"},
    {"api", "detokenizer"},
    {"serving", "measure", "testing"},
    {"train"},
    {"cli"},
    {"bench"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Files directly under eagle_jax/ that belong to a room of another name.
ROOM_OF = {"__main__": "cli"}

# room -> files that import it and may not. The facade is eagle_jax itself: public names, for users.
KNOWN = {
    "cli": {"eagle_jax.convert.__main__"},
    "tree": {"eagle_jax.sampling"},
}

# Files that import each other in a circle.
CIRCLES: list[set[str]] = []

# Packages that take long to import, and the rooms that need them as a whole; other rooms import them in functions.
HEAVY = {
    "gguf": set(),
    "torch": set(),
    "transformers": set(),
    "orbax": {"train"},
    "matplotlib": set(),
    "pydantic": {"train"},
    "rich": {"cli"},
}


def test_every_file_has_a_floor():
    assert {room(file) for file in files()} - {FACADE} <= FLOOR.keys()
    assert [name for name in ROOM_OF if f"{FACADE}.{name}" not in files()] == [], "gone from eagle_jax/: remove these"


def test_imports_go_down():
    found = defaultdict(set)
    for file, imported in imports().items():
        for other in {room(name) for name in imported} - {room(file)}:
            facade = other == FACADE and room(file) != "bench"
            if facade or (other != FACADE and (other == "cli" or FLOOR[other] >= FLOOR[room(file)])):
                found[other].add(file)
    only_shrinks(_pairs(found), _pairs(KNOWN))


def test_no_files_import_each_other_in_a_circle():
    reached = {file: _reachable(file) for file in imports()}
    circles = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in reached if a in reached[a]}
    only_shrinks({tuple(sorted(circle)) for circle in circles}, {tuple(sorted(circle)) for circle in CIRCLES})


def test_packages_that_take_long_are_imported_where_they_are_used():
    found = {
        (file, package)
        for file, path in files().items()
        for statement in _at_import(ast.parse(path.read_text(encoding="utf-8")).body)
        for package in {name.split(".")[0] for name in _names(statement)} & HEAVY.keys()
        if room(file) not in HEAVY[package]
    }
    assert found == set()


def test_a_room_gives_no_name_that_is_also_its_files():
    """`from eagle_jax.room import name` would be the one or the other, by what was imported before."""
    found = set()
    for file, path in files().items():
        if path.name == "__init__.py":
            own = {f"{file}.{name}" for name in _given(ast.parse(path.read_text(encoding="utf-8")))}
            found |= own & files().keys()
    assert found == set()


def only_shrinks(found: set, known: set) -> None:
    """Fails for what is not known, and for what is known and no longer found."""
    assert sorted(found - known) == [], "these break the rules above"
    assert sorted(known - found) == [], "these no longer break a rule: remove them from the list above"


@functools.cache
def files() -> dict[str, Path]:
    """{dotted name: path} of every file of the package and of bench; a folder's name is its __init__.py."""
    found = {}
    for path in sorted(path for top in (FACADE, "bench") for path in (ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(file: str) -> str:
    """ "models" of "eagle_jax.models.layers"."""
    top, *rest = file.split(".")
    return top if top != FACADE or not rest else ROOM_OF.get(rest[0], rest[0])


@functools.cache
def imports() -> dict[str, set[str]]:
    """{file: the files of ours that it imports, wherever in it}; without what the facade imports."""
    found = {}
    for file, path in files().items():
        if file != FACADE:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found[file] = {name for node in nodes for name in _names(node) if name.split(".")[0] in (FACADE, "bench")}
    return found


def _names(node: ast.AST) -> Iterator[str]:
    """The modules that a statement imports: files where they are ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative imports are not read here"
        whole = {f"{node.module}.{alias.name}" for alias in node.names}
        yield from whole & files().keys()
        if whole - files().keys():
            yield node.module


def _reachable(start: str) -> set[str]:
    """The files that a file imports, and that those import, and so on; through no facade."""
    found: set[str] = set()
    todo = [start]
    while todo:
        new = imports().get(todo.pop(), set()) - found - {FACADE}
        found |= new
        todo += new
    return found


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a file runs: none in functions, none for types alone."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from _at_import(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
            for part in ("body", "orelse", "handlers", "finalbody"):
                yield from _at_import(getattr(statement, part, []))


def _given(tree: ast.Module) -> Iterator[str]:
    """Returns the names that an __init__.py binds, except files that it imports under their own names."""
    for statement in _at_import(tree.body):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if f"{statement.module}.{alias.name}" not in files():
                    yield alias.asname or alias.name
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def _pairs(table: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {(file, room) for room, files in table.items() for file in files}
