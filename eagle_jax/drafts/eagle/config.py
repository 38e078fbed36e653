"""DraftConfig: the shape of an EAGLE head, read from its `config.json` (see flat_config.py for its spellings)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.drafts.eagle.flat_config import TAPS, flat_config
from eagle_jax.models.architectures import layer_windows
from eagle_jax.models.config import LlamaConfig, llama_fields
from eagle_jax.models.fields import ConfigError, flag, size
from eagle_jax.ops.spec import Spec

OFFICIAL_TAPS = 3  # target layers that an EAGLE-3 head reads, unless its config names them

# Parts that a config.json states by true or false, under the names of the fields.
FLAGS = (
    *("norm_before_residual", "qkv_bias", "qk_norm", "fc_norm", "norm_before_fc", "norm_output"),
    *("input_norms", "attention_norm"),
)


@dataclasses.dataclass(frozen=True)
class DraftConfig(LlamaConfig):
    """The sizes of an EAGLE head: its decoder layers, and the projections and norms around them.

    Several layers, `windows`, `qk_norm` and the norms of EAGLE-3.1 are EAGLE-3 only.

    draft_vocab_size: entries of an EAGLE-3 head's `lm_head`. Of an EAGLE-1 head: the frequent tokens that it drafts,
      with the target's rows of them (FR-Spec); 0 or `vocab_size` for all.
    target_hidden_size: of the target whose features it reads; differs from `hidden_size` in the 70B target's head.
    taps: target layers whose *input* is read; None means layers 2, n // 2 and n - 3 of an n-layer target.
    norm_before_residual: whether the residual is the normalised hidden state (some speculators heads).
    own_embedding: whether the head has an embedding; otherwise it uses the target's.
    own_lm_head: whether an EAGLE-3 head has an lm_head; otherwise it uses the target's, over the whole vocabulary.
    fc_bias: whether `fc` has a bias.
    fc_norm: RMSNorm of each tap before `fc`. norm_before_fc: one RMSNorm of all taps together. (EAGLE-3.1)
    norm_output: the next drafting step reads the hidden state after the final norm, not before it. (EAGLE-3.1)
      An EAGLE-1 head has a final norm only with it.
    input_norms: norms of the embedding and of the hidden state before an EAGLE-1 head's `fc`. attention_norm: the norm
      of the input of its layer's attention. Both are parts of every EAGLE-3 layer, where the fields are false.
    window: (first, recent) positions that the draft attends to; None for all. Not part of any checkpoint; see
      `with_window`.
    """

    draft_vocab_size: int = 0
    target_hidden_size: int = 0
    taps: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    own_embedding: bool = False
    fc_bias: bool = False
    window: tuple[int, int] | None = None
    own_lm_head: bool = True
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    _: dataclasses.KW_ONLY
    input_norms: bool = False
    attention_norm: bool = False

    @classmethod
    def from_hf(
        cls,
        hf: Mapping[str, Any],
        where: str = "config.json",
        own_embedding: bool = False,
        *,
        kind: str = "eagle3",
        own_lm_head: bool = True,
        fc_bias: bool | None = None,
    ) -> DraftConfig:
        """Reads a head's config dictionary in any form that `flat_config` knows.

        Args:
          kind: "eagle3", "eagle1" or "peagle", from the checkpoint's tensor names, as are `own_embedding` and
            `own_lm_head`. A separate draft vocabulary implies an lm_head.
          fc_bias: whether fc has a bias. An EAGLE-1 head's config decides, if it says so; None means True there. An
            EAGLE-3 head's tensor names decide; None means False.
        Raises:
          ConfigError: as LlamaConfig.from_hf, and for contradictory fields.
        """
        hf = flat_config(hf, where, kind)
        fields = llama_fields({"num_hidden_layers": 1} | hf, where)
        fields |= {name: flag(hf, name, where) for name in FLAGS}
        _check_parts(hf, fields["num_layers"], kind, where)
        stated_bias = flag(hf, "bias", where, default=fc_bias is not False or kind != "eagle1")
        if kind != "eagle1" and fc_bias and not stated_bias:
            raise ConfigError(f"{where}: bias = False, but the head has a tensor fc.bias; one of them is not its own")

        def optional_size(name: str, default: int) -> int:
            return size(name, hf.get(name, default), where)

        taps = hf.get(TAPS)
        if taps is not None and kind == "eagle1":
            raise ConfigError(f"{where}: {TAPS} names layers, an EAGLE-1 head reads none; the weights are not its own")
        num_taps = len(taps) if taps else OFFICIAL_TAPS
        if kind != "eagle1" and optional_size("num_aux_hidden_states", num_taps) != num_taps:
            named = f"{TAPS} names {num_taps}" if taps else f"{TAPS} names none, which means {num_taps}"
            raise ConfigError(f"{where}: num_aux_hidden_states is {hf['num_aux_hidden_states']}, {named}")
        vocab_size = fields["vocab_size"]
        draft_vocab_size = optional_size("draft_vocab_size", vocab_size)
        truncated = optional_size("truncated_vocab_size", vocab_size)  # vLLM's name, in EAGLE-1 heads
        if truncated not in (vocab_size, draft_vocab_size if kind == "eagle1" else vocab_size):
            raise ConfigError(
                f"{where}: truncated_vocab_size {truncated} for vocab_size {vocab_size} is not implemented for an "
                f"{kind} head that drafts {draft_vocab_size} tokens"
            )
        return cls(
            **fields,
            draft_vocab_size=draft_vocab_size,
            target_hidden_size=optional_size("target_hidden_size", fields["hidden_size"]),
            taps=taps,
            own_embedding=own_embedding,
            fc_bias=stated_bias if kind == "eagle1" else bool(fc_bias),
            windows=_windows(hf, fields["num_layers"], where),
            own_lm_head=own_lm_head or hf.get("draft_vocab_size", vocab_size) != vocab_size,
        )

    def attention_spec(self, layer: int) -> Spec:
        """What a layer's queries see: all positions, or those of its own window and of `window`."""
        own = super().attention_spec(layer)
        if self.window is None:
            return own
        first, recent = self.window
        return Spec(window=recent if own.window is None else min(recent, own.window), first=first)


def _check_parts(hf: Mapping[str, Any], num_layers: int, kind: str, where: str) -> None:
    """Raises ConfigError for a flat config that asks for parts which no head of this kind has together."""
    norms = flag(hf, "fc_norm", where), flag(hf, "norm_before_fc", where)
    if all(norms):
        raise ConfigError(f"{where}: fc_norm and norm_before_fc exclude each other; keep the one that has tensors")
    if num_layers > 1 and kind == "eagle1":
        raise ConfigError(f"{where}: an EAGLE-1 head has one layer, num_hidden_layers is {num_layers}")
    if num_layers > 1 and not flag(hf, "next_layer_regular", where, default=True):
        raise ConfigError(
            f"{where}: next_layer_regular = False is not implemented: layers after the first read no embedding"
        )


def _windows(hf: Mapping[str, Any], num_layers: int, where: str) -> tuple[int | None, ...]:
    """Reads the window of each layer: `sliding_window`, in the layers that `layer_types` names, or in all of them."""
    switch, kinds = hf.get("use_sliding_window"), hf.get("layer_types") or ()
    window = (flag(hf, "use_sliding_window", where, default=True) and hf.get("sliding_window")) or None
    slides = not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds)
    if not window and not switch and not slides:
        return ()  # layer_types of any length: it may be a copy of the target's
    if not kinds and switch and hf.get("max_window_layers"):
        raise ConfigError(
            f"{where}: max_window_layers = {hf['max_window_layers']!r} is not implemented; name the layers that slide "
            "in layer_types"
        )
    stated = {"num_hidden_layers": num_layers, "layer_types": kinds, "sliding_window": window}
    return layer_windows(stated, where, lambda layer: True)


def tap_layers(config: DraftConfig | None, num_layers: int) -> tuple[int, ...]:
    """Returns the target layers whose input an EAGLE-3 head reads, ascending (official code: 2, n // 2, n - 3).

    Index n is the residual stream after the last layer. Equal indices are repeated.
    """
    if config is not None and config.taps is not None:
        return config.taps
    return tuple(sorted(min(max(tap, 0), num_layers) for tap in (2, num_layers // 2, num_layers - 3)))
