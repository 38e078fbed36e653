"""Renames tensors by rules, which are data and work in both directions.

A rule is a pair of templates (official name, theirs). `{i}` stands for the index of a layer after the first,
`*` for the rest of a name.
"""

from __future__ import annotations

import functools
import re

Rules = tuple[tuple[str, str], ...]


def official_of(name: str, rules: Rules) -> str:
    """Returns the official name of a tensor: by the first rule that fits, else the name as it is."""
    return _renamed(name, tuple((theirs, official) for official, theirs in rules))


def theirs_of(name: str, rules: Rules) -> str:
    """Returns a framework's name of an official tensor: by the first rule that fits, else the name as it is."""
    return _renamed(name, rules)


def _renamed(name: str, rules: Rules) -> str:
    for source, wanted in rules:
        match = _pattern(source).fullmatch(name)
        if match:
            found = match.groupdict()
            return wanted.replace("{i}", found.get("i") or "").replace("*", found.get("rest") or "")
    return name


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """Compiles a template: "layers.{i}.*" matches "layers.3.mlp.up_proj.weight"."""
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>[1-9]\d*)").replace(r"\*", "(?P<rest>.*)"))
