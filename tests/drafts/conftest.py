"""Fixture `kind`, for `@pytest.mark.parametrize("kind", names, indirect=True)`."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module")
def kind(request):
    """All tests of a kind of draft, then those of the next: a process can hold only so many compiled programs."""
    yield request.param
    jax.clear_caches()
