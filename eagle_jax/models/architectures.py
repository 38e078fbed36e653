"""The architectures of targets that are read, by `model_type`, in one table.

They share one decoder, `Llama`, whose parts a `LlamaConfig` chooses. An entry reads an architecture's config.json into
such a config, and names the tensors that Llama's layers lack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from eagle_jax.models.config import LlamaConfig, llama_fields
from eagle_jax.models.fields import NEUTRAL_VALUES, ConfigError, flag, refuse_unknown_mathematics, size
from eagle_jax.models.llama import Llama

HF = Mapping[str, Any]  # a parsed config.json


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes what an architecture has and Llama has not.

    fields: (config.json, its name in messages) -> the fields of LlamaConfig that `llama_fields` does not read.
    reads: the fields of config.json that `fields` reads. Others of `NEUTRAL_VALUES` must have Llama's values.
    defaults: values of fields that an absent one stands for, where these are not Llama's.
    names: {path in a layer: official tensor name in a layer}, where `names.LAYER` has another or none.
    model: (config, key, dtype) -> the model: Llama, or a subclass with a layer of its own.
    """

    fields: Callable[[HF, str], dict[str, Any]] = lambda hf, where: {}
    reads: tuple[str, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    model: Callable[[LlamaConfig, jax.Array, Any], Llama] = Llama


def config_of(hf: HF, where: str = "config.json") -> LlamaConfig:
    """Reads the config.json of any architecture in ARCHITECTURES.

    Args:
      where: its name, for error messages.
    Raises:
      ConfigError: naming an architecture, a field or a value that is not implemented, or a size that is impossible.
    """
    name = hf.get("model_type") or "llama"
    name = "llama" if name in NEUTRAL_VALUES["model_type"] else name
    if name not in list(ARCHITECTURES):  # a damaged config.json may hold an unhashable value
        raise ConfigError(f"{where}: model_type = {name!r} is not implemented (accepted: {', '.join(ARCHITECTURES)})")
    architecture = ARCHITECTURES[name]
    hf = {**architecture.defaults, **hf}
    refuse_unknown_mathematics(hf, NEUTRAL_VALUES, where, reads=("model_type", *architecture.reads))
    fields = llama_fields(hf, where) | architecture.fields(hf, where)
    return LlamaConfig(**fields, model_type=name)


def layer_windows(hf: HF, where: str, is_windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Reads the window of each layer: `sliding_window`, in the layers that `layer_types` names.

    Args:
      is_windowed: says it of a layer's index where the config has no `layer_types`.
    Returns:
      None for full attention; () if no layer has a window.
    """
    layers = size("num_hidden_layers", hf.get("num_hidden_layers"), where)
    kinds = hf.get("layer_types")
    if not kinds:
        kinds = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(layers)]
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types must list a kind for each of {layers} layers, got {kinds!r}")
    other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if other:
        raise ConfigError(f"{where}: layer_types {other[0]!r} is not implemented (only full and sliding attention)")
    if "sliding_attention" not in kinds:
        return ()
    window = size("sliding_window", hf.get("sliding_window"), where)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _mistral(hf: HF, where: str) -> dict[str, Any]:
    """Reads one window for all layers."""
    has_window = hf.get("sliding_window") not in (None, 0, False)
    return {"windows": layer_windows(hf, where, lambda layer: has_window)}


def _qwen_windows(hf: HF, where: str) -> tuple[int | None, ...]:
    """Reads the windows of Qwen: those of `use_sliding_window`, in the layers from `max_window_layers` on."""
    if not flag(hf, "use_sliding_window", where):
        return layer_windows({**hf, "sliding_window": None}, where, lambda layer: False)
    first = hf.get("max_window_layers")
    if type(first) is not int or first < 0:
        raise ConfigError(f"{where}: max_window_layers must be a number of layers, got {first!r}")
    return layer_windows(hf, where, lambda layer: layer >= first)


WINDOWS = ("sliding_window", "layer_types")
QWEN_WINDOWS = (*WINDOWS, "use_sliding_window")

# Keyed by the `model_type` of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(_mistral, reads=WINDOWS, defaults={"sliding_window": 4096}),
    "qwen2": Architecture(
        lambda hf, where: {"qkv_bias": True, "windows": _qwen_windows(hf, where)},
        reads=QWEN_WINDOWS,
        defaults={"max_window_layers": 28, "sliding_window": 4096},
    ),
    "qwen3": Architecture(
        lambda hf, where: {"qk_norm": True, "windows": _qwen_windows(hf, where)},
        reads=QWEN_WINDOWS,
        defaults={"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096},
    ),
}
