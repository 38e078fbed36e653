"""The package's version, as its installation says."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("eagle-jax")
except importlib.metadata.PackageNotFoundError:  # run from a checkout
    __version__ = "unknown"
