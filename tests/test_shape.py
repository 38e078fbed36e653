"""How long a function and a file may be, and what a room says of itself, read from the syntax trees.

The functions that broke the rules when they were written down are listed. The list may only shrink: an entry that no
longer breaks a rule fails as well.
"""

from __future__ import annotations

import ast
import functools

from tests.test_import_rules import FACADE, files, only_shrinks

FUNCTION_LINES = 60
INNER_FUNCTIONS = 2
FILE_LINES = 450

# {file: functions that are too long, or hold too many functions}; a method's name is "Class.method".
KNOWN: dict[str, set[str]] = {}


def test_functions_are_short_and_hold_few_others():
    found = {(file, name) for file in files() for name, *size in functions(_tree(file)) if too_much(*size)}
    only_shrinks(found, {(file, name) for file, names in KNOWN.items() for name in names})


def test_files_are_short():
    lines = {file: len(path.read_text(encoding="utf-8").splitlines()) for file, path in files().items()}
    assert {file: count for file, count in lines.items() if count > FILE_LINES} == {}


def test_every_room_says_what_lives_there_and_what_it_may_import():
    rooms = [file for file, path in files().items() if path.name == "__init__.py" and file != FACADE]
    said = {file: " ".join((ast.get_docstring(_tree(file)) or "").split()).split(". ") for file in rooms}
    assert [file for file, (_, *rest) in said.items() if not any("May import" in sentence for sentence in rest)] == []


def test_functions_are_counted_with_what_they_hold():
    source = """
class Thing:
    def method(self):
        def one():
            def two():
                pass
        return one
"""
    assert list(functions(ast.parse(source))) == [
        ("Thing.method", 5, 2),
        ("Thing.method.one", 3, 1),
        ("Thing.method.one.two", 2, 0),
    ]
    assert not too_much(FUNCTION_LINES, INNER_FUNCTIONS)
    assert too_much(FUNCTION_LINES + 1, 0) and too_much(1, INNER_FUNCTIONS + 1)


def too_much(lines: int, inner: int) -> bool:
    return lines > FUNCTION_LINES or inner > INNER_FUNCTIONS


def functions(node: ast.AST, outer: str = ""):
    """Yields (name, lines without decorators, functions inside) of every function, those inside others, too."""
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{outer}.{child.name}".lstrip(".")
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            assert child.end_lineno is not None
            inner = sum(isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef) for x in ast.walk(child)) - 1
            yield name, child.end_lineno - child.lineno + 1, inner
        yield from functions(child, name)


@functools.cache
def _tree(file: str) -> ast.Module:
    return ast.parse(files()[file].read_text(encoding="utf-8"))
