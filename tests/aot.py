"""Compilers of accelerators that are not there (bench/aot/compilers.py); a test that lacks its compiler is skipped."""

from __future__ import annotations

from typing import Any

import pytest

from bench.aot import compilers
from bench.aot.compilers import compile_for, find_compilers

__all__ = ["compile_for", "find_compilers", "gpu_devices", "tpu_devices"]


def tpu_devices(topology: str = "v5e:2x2") -> list[Any]:
    return _or_skip(compilers.tpu_devices, topology)


def gpu_devices(count: int = 1) -> list[Any]:
    return _or_skip(compilers.gpu_devices, count)


def _or_skip(devices, which) -> list[Any]:
    try:
        return devices(which)
    except compilers.CompilerMissing as missing:
        pytest.skip(str(missing))
