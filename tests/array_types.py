"""Shapes stated by signatures are checked while tests run: jaxtyping's import hook, with beartype behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

# A module imported while a checked one runs would get bytecode of its own, so the largest is imported before.
import flax.nnx  # noqa: F401
import jaxtyping

try:
    import beartype
except ImportError:  # on a machine with a GPU, set up for nothing but decoding
    beartype = None  # type: ignore[assignment]

ROOMS = (
    "eagle_jax.tree",
    "eagle_jax.ops",
    "eagle_jax.models",
    "eagle_jax.drafts",
    "eagle_jax.decode",
    "eagle_jax.keys",
    "eagle_jax.sampling",
    "eagle_jax.api",
    "eagle_jax.serving",
    "eagle_jax.testing",
)

# Public functions that refuse wrong arguments in words of their own.
DOORS = {
    "eagle_jax.api.generate",
    "eagle_jax.api.stream",
    "eagle_jax.decode.insert.insert",
    "eagle_jax.decode.prefill.prefill",
    "eagle_jax.keys.row_keys",
}

F = TypeVar("F", bound=Callable)


def check_rooms() -> None:
    """Has the functions of the rooms checked. Call this before any of them is imported."""
    if beartype is not None:
        jaxtyping.install_import_hook(ROOMS, f"{__name__}.{check.__name__}")


def check(function: F) -> F:
    """Checks the arguments and the result whose annotations state a shape; the other annotations are mypy's.

    Constructors are not checked: JAX rebuilds pytrees with None, shardings or markers in place of arrays.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    hints = function.__annotations__
    # jaxtyping calls this for the arguments, with Any in place of the result, and for all: check nothing twice.
    if hints.get("return", Any) is not Any:
        hints = {"return": hints["return"]}
    shapes = {name: hint for name, hint in hints.items() if _states_shape(hint)}
    if not shapes or name in DOORS or name.endswith(".__init__"):
        return function
    function.__annotations__ = shapes
    return beartype.beartype(function)


def _states_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_states_shape(part) for part in get_args(hint))
