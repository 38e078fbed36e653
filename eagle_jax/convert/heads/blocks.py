"""The frameworks that write heads which draft blocks (DFlash, DSpark), one entry each: data only.

docs/export.md says which sources were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eagle_jax.convert.heads.rules import Rules
from eagle_jax.drafts.dflash import CAUSAL, FROM_ROOT, MASK, OUTPUTS, OWN, TWO_WAYS
from eagle_jax.drafts.dspark import READ_HEADS
from eagle_jax.drafts.eagle.flat_config import LAYER


@dataclasses.dataclass(frozen=True)
class BlockDialect:
    """Describes how a framework writes a head that drafts blocks. A checkpoint has the first dialect that it shows.

    title: for messages.
    architectures, marks, tensors: what shows the dialect; as in `HeadDialect`.
    types: the values of `marks` that are such heads; (): any.
    rules: from official tensor names to its own.
    layer: the object of its config.json that holds the fields of the layers; "": the top level.
    nested: the fields of the block that stand in `dflash_config`, under our names. twice: those of them that also stand
    at the top level. inputs: whether it names the tapped layers' inputs.
    fields: {its spelling: the field that is read}.
    implied: {field: its value where config.json does not state it}.
    required: fields that the config.json of a DSpark head must state, because readers differ on their defaults.
    layers: {model_type: that of its layers}, where its config.json names another.
    harmless: fields that do not change what a head computes.
    """

    title: str
    architectures: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    tensors: str | None = None
    rules: Rules = ()
    layer: str = ""
    nested: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    inputs: bool = False
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()


NESTED = (MASK, OUTPUTS, *CAUSAL)
# Both heads of DSpark at the top level, beside the tensors of DFlash.
FLAT_HEADS: Rules = (
    *((f"markov_head.{name}.*", f"{name}.*") for name in ("markov_w1", "markov_w2", "gate_proj", "joint_proj")),
    ("confidence_head.proj.*", "confidence_proj.*"),
)

BLOCKS: dict[str, BlockDialect] = {
    "block speculators": BlockDialect(
        title="speculators",
        marks=("speculators_model_type",),
        types=("dflash", "dspark"),
        layer=LAYER,
        inputs=True,
        required=(FROM_ROOT,),
        layers={"llama": "qwen3"},
        harmless=(
            *("speculators_config", "speculators_version", "embed_requires_grad", "max_anchors"),
            "transformer_layer_architecture",
        ),
    ),
    "block deepspec": BlockDialect(
        title="DeepSpec or NeMo Automodel",
        architectures=("Qwen3DSparkModel",),
        implied={FROM_ROOT: True},
        harmless=("num_anchors", "target_model_type"),
    ),
    "block nemo": BlockDialect(
        title="NeMo Automodel",
        architectures=("Qwen3DFlashDraftModel",),
        nested=(*NESTED, "block_size"),
        twice=("block_size",),
        implied={"causal": False},
    ),
    "block specforge": BlockDialect(
        title="SpecForge",
        architectures=("DSparkDraftModel",),
        nested=(*NESTED, *READ_HEADS),
        implied={"markov_head_type": "vanilla", TWO_WAYS: False},
        harmless=("attention_mode", "confidence_head_alpha"),
    ),
    "block modelopt": BlockDialect(
        title="Model-Optimizer",
        tensors=r"markov_w1\.weight",
        rules=FLAT_HEADS,
        nested=(*NESTED, *READ_HEADS, FROM_ROOT),
        fields={"use_confidence_head": "enable_confidence_head", "shift_label": FROM_ROOT},
        implied={"confidence_head_with_markov": True},
    ),
    "block": BlockDialect(title="DFlash's authors", nested=NESTED),
}

# Tensors of networks that are not implemented, by pattern: what they are.
BLOCK_REFUSED: dict[str, str] = {
    r"candidate_selector\..*|.*\.(attention_conv|mlp_conv)\..*": "DFlash 2",
    r"(prefix_gru|embed_proj)\..*": "a Domino head",
    r"(aux_hidden_norms|mask_embedding|fusion_(weights|norms))(\..*)?|.*\.(g_proj|sinks)(\..*)?": "a variant of DFlash",
    r"draft_adapter\..*": "an adapter before the lm_head",
    r".*\.(qweight|qzeros|scales|g_idx|weight_scale|input_scale)": "quantized weights",
    r"(.*\.)?(lora_[AB])\..*": "a LoRA adapter",
}
# Fields of the decoder layers, beside those whose values `models.fields` checks.
LAYER_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("attention_bias", "mlp_bias", "layer_types", OWN, LAYER),
)
