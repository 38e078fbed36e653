"""Errors for files that are damaged, incomplete or of another kind."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is. The message names the file and tensor, and what to do."""


class NotConvertedError(CheckpointError):
    """Raised for a folder without a manifest: it is not converted, perhaps an official checkpoint."""
