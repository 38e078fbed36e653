"""The public API and the command line, printed and compared with public_api.txt, so that no name goes unnoticed.

    python -m tests.test_public_api        writes the file anew; read its diff: a line that goes breaks someone's script

Annotations are left out: no caller depends on them. Everything is rendered here, neither by `inspect` nor by
`argparse`, whose texts differ between versions of Python and widths of terminals.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pydantic
import pytest

import eagle_jax.cli
import eagle_jax.convert.__main__
from eagle_jax.train.config import TrainSettings

FILE = Path(__file__).parent / "public_api.txt"
RENEW = "python -m tests.test_public_api"

# Modules whose `__all__` is public, and names of other modules that the docs show.
MODULES = ("eagle_jax", "eagle_jax.convert", "eagle_jax.sampling", "eagle_jax.train", "eagle_jax.tree")
SHOWN = {"eagle_jax.models.params": ("flatten", "load")}

COMMANDS = {"eagle-jax": eagle_jax.cli.main, "python -m eagle_jax.convert": eagle_jax.convert.__main__.main}


def test_every_name_and_every_option_is_that_of_the_file():
    before, after = FILE.read_text(encoding="utf-8").splitlines(), rendered().splitlines()
    diff = list(difflib.unified_diff(before, after, "public_api.txt", "now", n=8, lineterm=""))
    gone = [line for line in diff[2:] if line.startswith("-")]
    what = "the public API lost or changed lines of" if gone else "the public API has lines that are not in"
    if diff:
        pytest.fail("\n".join([f"{what} tests/public_api.txt. If that is meant: {RENEW}", *diff]), pytrace=False)


def test_every_option_is_in_its_help():
    for name, main in COMMANDS.items():
        for command, parser in commands(name, parser_of(main)):
            text = parser.format_help()
            options = [option for action in parser._actions for option in action.option_strings]
            assert options and [option for option in options if option not in text] == [], command


def rendered() -> str:
    """All of it, as the file has it."""
    return "\n".join([*api(), *command_lines(), *settings_lines()]) + "\n"


def api() -> Iterator[str]:
    """Every public name of Python, with its parameters, methods and fields."""
    printed: dict[Any, str] = {}  # object -> where it was printed
    for module in (*MODULES, *SHOWN):
        names = SHOWN.get(module) or sorted(importlib.import_module(module).__all__)
        yield f"======== {module}"
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if isinstance(value, type) or inspect.isroutine(inspect.unwrap(value)):
                if value in printed:
                    yield f"{name}: see {printed[value]}"
                    continue
                printed[value] = module
            yield from _public(name, value)
        yield ""


def _public(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, types.ModuleType):
        yield f"module {name}"
    elif isinstance(value, type):
        yield from _class(name, value)
    elif typing.get_origin(value) is not None:
        yield f"alias {name}"
    elif callable(value):
        yield f"def {name}"
        yield from _parameters(value)
    elif isinstance(value, Mapping):
        yield f"mapping {name}"
        yield from (f"    {key!r}" for key in value)
    elif name == "__version__":
        yield f"constant {name}"
    else:
        yield f"constant {name} = {value!r}"


def _class(name: str, cls: type) -> Iterator[str]:
    """How to make one, and its methods and properties, inherited ones too."""
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "eagle_jax"]
    bases = [base for base in cls.__mro__[1:] if base.__name__ in eagle_jax.__all__ or base in (ValueError, tuple)]
    yield f"class {name}" + (f"({', '.join(base.__name__ for base in bases)})" if bases else "")
    fields = getattr(cls, "_fields", ())  # of a NamedTuple
    if fields:
        defaults = cls._field_defaults  # type: ignore[attr-defined]
        yield "    made of"
        yield from (
            f"        {field}" + (f"={shown(defaults[field])}" if field in defaults else "") for field in fields
        )
    elif any("__init__" in vars(base) for base in ours) and not getattr(cls, "_is_protocol", False):
        yield "    made of"
        yield from _parameters(cls.__init__, bound=True, indent=8)
    fields = (*fields, *getattr(cls, "__dataclass_fields__", ()))
    members = {member for base in ours for member in vars(base) if not member.startswith("_") or member == "__call__"}
    for member in sorted(members.difference(fields)):
        value = inspect.getattr_static(cls, member)
        if isinstance(value, property | functools.cached_property):
            yield f"    property {member}"
        elif isinstance(value, classmethod | staticmethod):
            yield f"    {type(value).__name__} {member}"
            yield from _parameters(value.__func__, bound=isinstance(value, classmethod), indent=8)
        elif callable(value):
            yield f"    method {member}"
            yield from _parameters(value, bound=True, indent=8)
        else:
            yield f"    attribute {member}"


def _parameters(function: Callable[..., Any], bound: bool = False, indent: int = 4) -> Iterator[str]:
    """A line each, so that one more is a line more. bound: without the first, self or cls."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    notes = {
        inspect.Parameter.KEYWORD_ONLY: "  (keyword only)",
        inspect.Parameter.POSITIONAL_ONLY: "  (by position only)",
    }
    for parameter in list(inspect.signature(function).parameters.values())[int(bound) :]:
        default = "" if parameter.default is parameter.empty else f"={shown(parameter.default)}"
        yield " " * indent + f"{stars.get(parameter.kind, '')}{parameter.name}{default}{notes.get(parameter.kind, '')}"


def shown(value: Any) -> str:
    """A default: functions and types by their name, because their repr differs between processes and versions."""
    return getattr(value, "__name__", None) or repr(value)


class Caught(BaseException):
    """Carries the parser of a command out of its `main`."""


def parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser that a command makes for its arguments."""

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        raise Caught(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            main([])
        except Caught as caught:
            return caught.args[0]
    raise AssertionError("it parsed no arguments")


def commands(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of its subcommands, by their names."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from commands(f"{name} {word}", command)


def command_lines() -> Iterator[str]:
    """What the --help of every command says."""
    for name, main in COMMANDS.items():
        for command, parser in commands(name, parser_of(main)):
            yield f"======== {command} --help"
            yield from (parser.description or "").splitlines()
            for group in parser._action_groups:
                if group._group_actions:
                    yield f"-- {group.title}"
                    yield from filter(None, [group.description])
                    yield from (line for action in group._group_actions for line in _option(action))
            for alternatives in parser._mutually_exclusive_groups:
                yield "-- one of: " + ", ".join(_names(action) for action in alternatives._group_actions)
            yield from (parser.epilog or "").splitlines()
            yield ""


def _names(action: argparse.Action) -> str:
    return ", ".join(action.option_strings) or action.dest


def _option(action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._SubParsersAction):
        yield from (f"{command.dest}\n    {command.help}" for command in action._choices_actions)
        return
    about = [_names(action)]
    about += [str(action.metavar)] if action.metavar else []
    about += [f"nargs={action.nargs}"] if action.nargs is not None else []
    about += [f"choices={', '.join(map(str, action.choices))}"] if action.choices else []
    about += ["required"] if action.required and action.option_strings else []
    about += [f"default={shown(action.default)}"] if action.default not in (None, argparse.SUPPRESS) else []
    yield " | ".join(about)
    yield "    " + " ".join((action.help or "").split())


def settings_lines() -> Iterator[str]:
    """The settings that `eagle-jax train` takes from its file and as KEY=VALUE."""
    yield "======== settings of eagle-jax train"
    yield from _settings(TrainSettings)


def _settings(model: type[pydantic.BaseModel], section: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
            yield from _settings(inner, f"{section}{name}.")
        else:
            yield f"{section}{name}" + ("" if field.is_required() else f" = {field.default!r}")


if __name__ == "__main__":
    FILE.write_text(rendered(), encoding="utf-8")
