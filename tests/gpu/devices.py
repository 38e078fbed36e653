"""Where a parity test runs: on the GPU if it is marked `gpu`, else on the CPU, so that the test itself is tested here.

JAX runs on its default device; the parameter is PyTorch's name of the same one.
"""

from __future__ import annotations

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
