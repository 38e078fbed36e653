"""Writes trained models as checkpoint folders of the official formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.convert import to_official
from eagle_jax.convert.exporting import CONFIG, SAFETENSORS, export, write_tensors
from eagle_jax.convert.read import read_json
from eagle_jax.convert.small_files import copy_small_files
from eagle_jax.files.atomic import new_folder, write_json
from eagle_jax.models import params
from eagle_jax.models.llama import Llama
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.loss.eagle import in_dtype


def save(model: Any, target: Llama | None, folder: Path, settings: TrainSettings) -> None:
    """Writes a trained head of `target`; a trained target if `target` is None.

    Raises:
      ValueError: see `check_range`.
    """
    check_range(model, settings.save_dtype)
    if target is None:
        save_target(model, Path(str(settings.model)), folder, settings.save_dtype)
    else:
        save_head(model, target, folder, settings.save_dtype, settings.save_format)


def save_target(model: Llama, config: Path, folder: Path, dtype: str) -> None:
    """Writes a language model, its config.json, and the tokenizer files in the folder of `config`."""
    with new_folder(folder.resolve()) as place:
        write_tensors(place / SAFETENSORS, to_official(in_dtype(jax.device_get(model), dtype)))
        write_json(place / CONFIG, read_json(config) | {"torch_dtype": dtype})
        copy_small_files(config.parent, place)


def save_head(head: Any, target: Llama, folder: Path, dtype: str, format: str = "official") -> None:
    """Writes a head as .safetensors in a format of `export`, which also reads it back as a check."""
    export(jax.device_get(head), target, folder, format=format, dtype=dtype, overwrite=True, safetensors=True)


def check_range(model: Any, dtype: str) -> None:
    """Refuses a model whose numbers overflow `dtype`.

    Raises:
      ValueError: naming the parameter and the setting.
    """
    limit = float(jnp.finfo(dtype).max)
    for path, array in params.flatten(model).items():
        if (
            jnp.issubdtype(array.dtype, jnp.floating)
            and not (largest := np.abs(np.asarray(array, np.float32)).max()) <= limit
        ):
            raise ValueError(
                f"{path} holds {largest:.3g}, and {dtype} at most {limit:.3g}: set save_dtype to bfloat16 or float32 "
                "and start the same command again, which only writes the model then"
            )
