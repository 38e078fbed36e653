"""The site of `make docs`: the pages of this folder, one of which runs, and the API reference from the docstrings."""

from __future__ import annotations

import re

from sphinx.util import logging

import eagle_jax
import eagle_jax.convert
import eagle_jax.sampling
import eagle_jax.train
import eagle_jax.tree

project = "eagle_jax"
version = release = eagle_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "sphinx_book_theme"
html_title = "eagle_jax"
exclude_patterns = ["_build"]

nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell
nb_merge_streams = True

myst_heading_anchors = 3  # for links such as results.md#how-fast-is-the-demo
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100  # a longer one has a line a parameter

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


PUBLIC = (eagle_jax, eagle_jax.convert, eagle_jax.sampling, eagle_jax.train, eagle_jax.tree)


def check_api(app, env) -> None:
    """Warns of public names that the API reference lacks. One that several modules export is there once."""
    documented = env.get_domain("py").objects
    for module in PUBLIC:
        for name in module.__all__:
            value = getattr(module, name)
            places = [other.__name__ for other in PUBLIC if getattr(other, name, None) is value]
            if not any(f"{place}.{name}" in documented for place in places):
                logging.getLogger(__name__).warning("api.md has no %s.%s", module.__name__, name)


def short_arrays(app, what, name, obj, options, signature, returns):
    """Writes shapes as the source does, Float[Array, "batch"], without the module that an array's class is in."""
    return tuple(text and re.sub(r"\bjaxlib\.[\w.]*\bArray\b", "Array", text) for text in (signature, returns))


def setup(app) -> None:
    app.connect("autodoc-process-signature", short_arrays)
    app.connect("autodoc-process-docstring", to_rst)
    app.connect("env-check-consistency", check_api)
