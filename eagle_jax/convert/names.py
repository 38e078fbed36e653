"""Maps our parameter paths to official tensor names, by tables.

Letters: N query heads, K key-value heads, H head dim, D hidden size, V vocabulary, Vd draft vocabulary.

Both sides keep PyTorch's order, output dimension first. Only queries, keys and values differ in shape: their heads
are a dimension here. q is [N, H, D] for the official (N * H, D), its bias [N, H] for (N * H,). Every conversion is a
reshape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# One decoder layer, without its prefix: our path -> official name.
LAYER: dict[str, str] = {
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "attention.o_bias": "self_attn.o_proj.bias",
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.gate_bias": "mlp.gate_proj.bias",
    "mlp.up_bias": "mlp.up_proj.bias",
    "mlp.down_bias": "mlp.down_proj.bias",
}


def decoder_table(layer: Mapping[str, str]) -> dict[str, str]:
    """Builds the table of a language model from that of its layers; {i} stands for a layer's index."""
    return {
        "embed": "model.embed_tokens.weight",
        **{f"layers.{{i}}.{path}": f"model.layers.{{i}}.{name}" for path, name in layer.items()},
        "norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
    }


# All parameters of each kind of model.
LLAMA: dict[str, str] = decoder_table(LAYER)
# The same in GGUF files.
_GGUF_LAYER: dict[str, str] = {
    "input_norm": "attn_norm",
    "post_attention_norm": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
GGUF: dict[str, str] = {
    "embed": "token_embd.weight",
    **{f"layers.{{i}}.{path}": f"blk.{{i}}.{name}.weight" for path, name in _GGUF_LAYER.items()},
    **{f"layers.{{i}}.{path}_bias": f"blk.{{i}}.{name}.bias" for path, name in _GGUF_LAYER.items() if "." in path},
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
EAGLE3: dict[str, str] = {
    "embed": "embed_tokens.weight",
    "fc_norm.{i}": "fc_norm.{i}.weight",
    "input_norm": "input_norm.weight",
    "fc": "fc.weight",
    "fc_bias": "fc.bias",
    **{f"layer.{path}": f"midlayer.{name}" for path, name in LAYER.items()},
    "layer.hidden_norm": "midlayer.hidden_norm.weight",
    **{f"layers.{{i}}.{path}": f"layers.{{i}}.{name}" for path, name in LAYER.items()},
    "norm": "norm.weight",
    "lm_head": "lm_head.weight",
    "target_ids": "d2t",
}
# Newer exports of EAGLE-3 heads.
EAGLE3_LAYERS: dict[str, str] = {path: name.replace("midlayer.", "layers.0.") for path, name in EAGLE3.items()}
MASK_HIDDEN = "mask_hidden"  # only a P-EAGLE head has it; path and name
PEAGLE: dict[str, str] = EAGLE3_LAYERS | {MASK_HIDDEN: MASK_HIDDEN}
EAGLE1: dict[str, str] = {
    "embed": "embed_tokens.weight",
    "fc": "fc.weight",
    "fc_bias": "fc.bias",
    **{f"layer.{path}": f"layers.0.{name}" for path, name in LAYER.items()},
    # Norms that the official heads lack, as Megatron names them.
    "embed_norm": "enorm.weight",
    "hidden_norm": "hnorm.weight",
    "norm": "norm.weight",
    # A head of frequent tokens has a table of them, as an EAGLE-3 head does. Its lm_head is the target's.
    "target_ids": "d2t",
}

DFLASH: dict[str, str] = {
    "embed": "embed_tokens.weight",
    "fc": "fc.weight",
    "hidden_norm": "hidden_norm.weight",
    **{f"layers.{{i}}.{path}": f"layers.{{i}}.{name}" for path, name in LAYER.items()},
    "norm": "norm.weight",
    "lm_head": "lm_head.weight",
    "target_ids": "d2t",
}
DSPARK: dict[str, str] = DFLASH | {
    "markov.embed": "markov_head.markov_w1.weight",
    "markov.lm_head": "markov_head.markov_w2.weight",
    "markov.gate": "markov_head.gate_proj.weight",
    "markov.gate_bias": "markov_head.gate_proj.bias",
    "markov.joint": "markov_head.joint_proj.weight",
    "markov.joint_bias": "markov_head.joint_proj.bias",
    "confidence": "confidence_head.proj.weight",
    "confidence_bias": "confidence_head.proj.bias",
}

# EAGLE-1 heads in the format of speculators (up to its version 0.3).
EAGLE1_FUSION: dict[str, str] = {
    path: name.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc.") for path, name in EAGLE1.items()
}

# A tensor of Medusa heads: prefix, head, place in the head, kind. Newer files have the prefix, older ones none.
# Two digits bound the table, whose size the names of an untrusted file decide.
MEDUSA_PREFIX = "medusa_head."
MEDUSA = re.compile(rf"({re.escape(MEDUSA_PREFIX)})?(\d{{1,2}})\.(\d{{1,2}})\.(linear\.weight|linear\.bias|weight)")

# Vocabulary tables of an EAGLE-3 head; read and written apart from the weights.
DRAFT_TO_TARGET, TARGET_TO_DRAFT = "d2t", "t2d"
# CPM.cu's and vLLM's tables of an EAGLE-1 head's frequent tokens: their ids, where d2t holds offsets.
REMAP, TOKEN_MAP = "token_id_remap", "token_map"
TABLES = (DRAFT_TO_TARGET, TARGET_TO_DRAFT, REMAP, TOKEN_MAP)

# vLLM prefixes all names of a head except fc and lm_head, NeMo most of them.
PREFIX = "model."
# Tensors that vLLM loads with an EAGLE-1 head and does not use.
VLLM_UNREAD = re.compile(r"layers\.0\.input_layernorm\.weight|norm\.weight")

# Redundant tensors: old exporters wrote the RoPE frequencies, speculators a copy of the target's last weights.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|verifier_(norm|lm_head)\.weight")

# {path: axis}: dimensions `axis` and `axis + 1` (heads, head dim) are one dimension of the official tensor.
HEAD_AXIS: dict[str, int] = {
    "attention.q": 0,
    "attention.k": 0,
    "attention.v": 0,
    "attention.q_bias": 0,
    "attention.k_bias": 0,
    "attention.v_bias": 0,
}


def medusa_names(num_heads: int, num_blocks: int, prefix: str = MEDUSA_PREFIX) -> dict[str, str]:
    """Builds the table of Medusa heads. A head's lm_head has the index after its last block."""
    table = {}
    for i in range(num_heads):
        for j in range(num_blocks):
            for part in ("weight", "bias"):
                table[f"heads.{i}.blocks.{j}.{part}"] = f"{prefix}{i}.{j}.linear.{part}"
        table[f"heads.{i}.lm_head"] = f"{prefix}{i}.{num_blocks}.weight"
    return table


def official_name(table: Mapping[str, str], path: str) -> str:
    """Looks a path up: "layers.3.attention.q" -> "model.layers.3.self_attn.q_proj.weight" in the table LLAMA."""
    index = re.search(r"\d+", path)
    if index is None or path in table:
        return table[path]
    return table[path.replace(index[0], "{i}", 1)].replace("{i}", index[0], 1)


def official_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Merges heads and head dim of a path's shape: ("layer.attention.q", (N, H, D)) -> (N * H, D)."""
    axis = HEAD_AXIS.get(".".join(path.split(".")[-2:]))
    if axis is None:
        return tuple(shape)
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def eagle3_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of an EAGLE-3 head; None for names of another kind."""
    if any(name.startswith("midlayer.") for name in tensor_names):
        return EAGLE3
    return EAGLE3_LAYERS if "layers.0.hidden_norm.weight" in tensor_names else None


def peagle_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of a P-EAGLE head; None for names of another kind."""
    table = eagle3_table(tensor_names)
    return None if table is None or MASK_HIDDEN not in tensor_names else table | {MASK_HIDDEN: MASK_HIDDEN}


def dflash_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of a DFlash head; None for names of another kind."""
    return DFLASH if {DFLASH["fc"], DFLASH["hidden_norm"]}.issubset(tensor_names) else None


def dspark_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of a DSpark head; None for names of another kind. Call it before `dflash_table`."""
    its_own = set(DSPARK.values()).difference(DFLASH.values())
    return DSPARK if dflash_table(tensor_names) is not None and its_own.intersection(tensor_names) else None


def eagle1_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of an EAGLE-1 head; None for names of another kind. Call `eagle3_table` first."""
    if dflash_table(tensor_names) is not None:
        return None
    if "fc.weight" in tensor_names and any(name.startswith("layers.0.") for name in tensor_names):
        return EAGLE1
    return EAGLE1_FUSION if "fusion_fc.weight" in tensor_names else None


def medusa_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of Medusa heads; the highest indices in the names give the numbers of heads and blocks."""
    found = [match for match in map(MEDUSA.fullmatch, tensor_names) if match]
    if not found:
        return None
    num_heads = 1 + max(int(match[2]) for match in found)
    num_blocks = max(int(match[3]) + (match[4] != "weight") for match in found)
    return medusa_names(num_heads, num_blocks, MEDUSA_PREFIX if any(match[1] for match in found) else "")


def llama_table(tensor_names: Collection[str]) -> dict[str, str] | None:
    """Returns the table of a language model; None for names of another kind."""
    if any(name.startswith("model.layers.") for name in tensor_names):
        return LLAMA
    return GGUF if any(name.startswith("blk.") for name in tensor_names) else None
