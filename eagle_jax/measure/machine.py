"""Describes what a measurement depends on besides the models: device, versions, dtype, date."""

from __future__ import annotations

import datetime
import os
from typing import Any

import jax
import numpy as np

from eagle_jax.models.target import Target


def device_name() -> str:
    """Returns "CPU, 2 cores" or "NVIDIA H200"."""
    device = jax.devices()[0]
    return f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind


def setting(target: Target) -> dict[str, Any]:
    """Returns the setting of a measurement as JSON values."""
    return {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": device_name(),
        "dtype": np.dtype(target.dtype).name,
    }


def describe_setting(setting: dict[str, Any]) -> str:
    """Returns "CPU, 2 cores, jax 0.10.2, float32; 2026-01-31"."""
    return f"{setting['device']}, jax {setting['jax']}, {setting['dtype']}; {setting['date']}"
