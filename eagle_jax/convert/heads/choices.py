"""What a caller says about a head whose config.json leaves it open, and what was taken of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class HeadChoices:
    """Settles what the config.json of a head leaves open. None: as the config says, and an error if it is open.

    taps: "inputs" or "outputs", what its ids of tapped layers name; or the layers whose input the head reads.
    norm_output: whether the next drafting step reads the hidden state after the final norm.
    norm_before_residual: whether the residual is the normalised hidden state.
    token_map: a file that lists the tokens which an EAGLE-1 head drafts (FR-Spec), by their target ids.
    num_depths: the tokens that a P-EAGLE head drafts in a pass, the depth that it was trained for.
    mask_token: the id of the token that stands for one to predict, of a head that drafts several tokens in a pass.
    causal_windows: of a head that drafts blocks, whether a token sees only those before it in layers with a window.
    from_root: of such a head, whether the output at the root predicts the token after it (`sample_from_anchor`).
    ignored: unknown fields of its config.json that do not change what the head computes.
    """

    taps: str | tuple[int, ...] | None = None
    norm_output: bool | None = None
    norm_before_residual: bool | None = None
    ignored: tuple[str, ...] = ()
    token_map: str | None = None
    num_depths: int | None = None
    mask_token: int | None = None
    causal_windows: bool | None = None
    from_root: bool | None = None

    def __post_init__(self) -> None:
        listed = isinstance(self.taps, tuple) and all(type(layer) is int and layer >= 0 for layer in self.taps)
        if self.taps not in (None, "inputs", "outputs") and not (listed and self.taps):
            raise ValueError(f"taps must be 'inputs', 'outputs' or a tuple of layer indices, not {self.taps!r}")
        for name, least in (("num_depths", 1), ("mask_token", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class HeadReading:
    """Describes how a head's config.json was read. A converted folder keeps it, so that it is read alike again.

    dialect: a key of `dialects.DIALECTS` or `blocks.BLOCKS`.
    fields: values that take the place of config.json's, or of absent ones. reasons: {field: why}.
    """

    dialect: str
    fields: Mapping[str, Any]
    reasons: Mapping[str, str]

    @classmethod
    def of_manifest(cls, entry: Any) -> HeadReading | None:
        """Reads a manifest's entry; folders of older versions have none."""
        return None if entry is None else cls(str(entry["dialect"]), dict(entry["fields"]), dict(entry["reasons"]))
