"""Sets up JAX's persistent compilation cache, so that a second start of a command compiles nothing."""

from __future__ import annotations

import os
from pathlib import Path

import jax

CACHE = "EAGLE_JAX_CACHE"  # the environment variable with another folder, or "off"
SHORTEST = 0.5  # seconds: programs that compile faster are not kept
LARGEST = 4 * 2**30  # bytes of the folder; the programs used longest ago go first


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on, unless the user has set it up, or off by EAGLE_JAX_CACHE=off."""
    folder = os.environ.get(CACHE) or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "eagle_jax" / "xla")
    if folder == "off" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
