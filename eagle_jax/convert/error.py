"""CheckpointError: the one error of this package for files that are damaged, incomplete or of another kind."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is. The message names the file and tensor, and what to do."""
