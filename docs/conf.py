"""The site of `make docs`: the pages of this folder, and the API reference from the docstrings."""

from __future__ import annotations

import re

import eagle_jax

project = "eagle_jax"
version = release = eagle_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "sphinx_book_theme"
html_title = "eagle_jax"
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # for links such as results.md#how-fast-is-the-demo
autodoc_member_order = "bysource"

FIELD = re.compile(r"\w+(, \w+)*: ")


def to_rst(app, what, name, obj, options, lines) -> None:
    """Turns two habits of the docstrings into reStructuredText.

    A paragraph of lines `name: what it holds`, some continued, becomes a definition list; an indented one becomes code.
    """
    result: list[str] = []
    for paragraph in re.split(r"\n\n+", "\n".join(lines).strip("\n")):
        block = paragraph.split("\n")
        heads = [line for line in block if not line.startswith(" ")]
        if heads and block[0] == heads[0] and all(FIELD.match(line) for line in heads):
            for line in block:
                field, text = line.split(": ", 1) if line in heads else ("", line.strip())
                result += [f"``{field}``", f"   {text}"] if field else [f"   {text}"]
        elif what == "module" and not heads:
            result += ["::", "", *block]
        else:
            result += block
        result.append("")
    lines[:] = result


def setup(app) -> None:
    app.connect("autodoc-process-docstring", to_rst)
